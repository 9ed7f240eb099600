"""Which calls the kernels serve, with what options, and the package without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from echovideo_kernels.dispatch import options, serves, table
from tests.kernels.comparing import pretended_gpu

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, (9, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float32, (9, 0), True),
        ("cuda", torch.float64, (9, 0), False),
        ("cuda", torch.bfloat16, (8, 0), False),
        ("cpu", torch.bfloat16, (9, 0), False),
    ],
)
def test_dispatch_serves_the_dtypes_devices_and_chips_of_its_table(
    device: str, dtype: torch.dtype, capability: tuple[int, int], expected: bool
) -> None:
    with pretended_gpu(capability):
        assert serves("modulated_norm", torch.empty(2, dtype=dtype, device=device), 1) is expected


def test_dispatch_attention_serves_from_the_tables_token_count_on() -> None:
    from_tokens = table()["sm_90"]["operators"]["attention"]["from_tokens"]
    with pretended_gpu():
        x = torch.empty(2, dtype=torch.bfloat16, device="cuda")
        assert [serves("attention", x, from_tokens + more) for more in (-1, 0)] == [False, True]


def test_dispatch_options_are_the_tables_without_its_token_count() -> None:
    entry = table()["sm_90"]["operators"]["qk_norm_rope"]
    assert {"from_tokens": entry["from_tokens"], **options("qk_norm_rope", torch.empty(2))} == entry


def test_kernels_without_triton_import_and_run_on_the_cpu() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from echovideo_kernels import quantize_rows
print(quantize_rows(torch.full((1, 16), 448.0))[1].item())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=KERNELS)
    assert run.stdout == "1.0\n", run.stderr
