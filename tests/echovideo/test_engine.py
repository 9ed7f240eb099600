from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from echovideo import EchoVideoPipeline
from echovideo.conditioning import Condition
from echovideo.engine import Engine, Rendered
from echovideo.errors import RenderCancelledError, RequestError, RunError
from echovideo.request import RenderRequest
from echovideo.settings import EngineSettings

REQUEST = RenderRequest(
    row_id="a", prompt="p", photo_uri="a.png", height=48, width=32, num_frames=9, num_inference_steps=3
)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.open(tiny_folder, EngineSettings())


@pytest.fixture(scope="module")
def condition() -> Condition:
    generator = torch.Generator().manual_seed(0)
    return Condition(
        fused_2ND=torch.randn(2, 226, 128, generator=generator),
        face_mean_CHW=torch.randn(16, 6, 4, generator=generator),
        face_std_CHW=torch.ones(16, 6, 4),
    )


def render(engine: Engine, condition: Condition, seed: int) -> Rendered:
    return engine.render(condition, REQUEST, seed, lambda step, steps, draw: True)


def test_engine_same_seed_gives_the_same_bytes_and_another_seed_others(engine: Engine, condition: Condition) -> None:
    first, second, other = (render(engine, condition, seed).frames_FHWC for seed in (1, 1, 2))
    assert first.shape == (9, 48, 32, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert np.array_equal(first, second)
    assert (first != other).mean() > 0.5


def test_engine_pins_its_thread_count_wherever_it_runs(engine: Engine, condition: Condition) -> None:
    expected = render(engine, condition, 1).frames_FHWC
    torch.set_num_threads(1)
    assert np.array_equal(render(engine, condition, 1).frames_FHWC, expected)
    assert torch.get_num_threads() == 2


def test_engine_told_to_stop_stops_before_the_next_step(engine: Engine, condition: Condition) -> None:
    asked: list[tuple[int, int]] = []

    def keep_going(step: int, steps: int, draw: Callable[[], bytes]) -> bool:
        asked.append((step, steps))
        return step < 1

    with pytest.raises(RenderCancelledError, match="after 1 of 3 steps"):
        engine.render(condition, REQUEST, 1, keep_going)
    assert asked == [(0, 3), (1, 3)]


def test_engine_other_tier_is_refused(engine: Engine, condition: Condition) -> None:
    request = RenderRequest(row_id="a", prompt="p", photo_uri="a.png", tier="fast")
    with pytest.raises(RequestError, match="'fast'"):
        engine.render(condition, request, 1, lambda step, steps, draw: True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_engine_gpu_asked_for_and_absent_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(RunError, match="torch finds none") as caught:
        Engine.open(tiny_folder, EngineSettings(device="cuda"))
    assert caught.value.code == "no_gpu"


@pytest.mark.gpu
def test_engine_on_gpu_renders_the_same_bytes_twice(tiny_folder: Path, condition: Condition) -> None:
    engine = Engine.open(tiny_folder, EngineSettings(device="cuda"))
    first, second = (render(engine, condition, 1).frames_FHWC for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.gpu
def test_pipeline_on_gpu_is_near_the_cpu_in_float32_and_finite_in_bfloat16(
    tiny_folder: Path, astronaut_png: bytes
) -> None:
    call = {"prompt": "a person waves", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4}
    on_cpu, on_gpu, rounded = (
        EchoVideoPipeline.from_pretrained(tiny_folder, dtype=dtype, device=device)(
            astronaut_png, **call, generator=torch.Generator().manual_seed(1), output_type="np"
        ).frames
        for dtype, device in ((torch.float32, "cpu"), (torch.float32, "cuda"), (torch.bfloat16, "cuda"))
    )
    assert np.corrcoef(on_cpu.ravel(), on_gpu.ravel())[0, 1] > 0.999
    # torch draws other normal numbers in bfloat16 from the same seed, so this is another picture.
    assert rounded.shape == on_cpu.shape
    assert np.isfinite(rounded).all()
    assert rounded.std() > 0.05


def test_pipeline_photo_and_prompt_render_a_video_of_that_photo(
    tiny_folder: Path, astronaut_png: bytes, hopper_jpg: bytes
) -> None:
    pipeline = EchoVideoPipeline.from_pretrained(tiny_folder)
    call = {"prompt": "a person waves", "height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    videos = [
        pipeline(photo, **call, generator=torch.Generator().manual_seed(1), output_type="np").frames
        for photo in (astronaut_png, astronaut_png, hopper_jpg)
    ]
    assert videos[0].shape == (1, 9, 32, 32, 3)
    assert np.array_equal(videos[0], videos[1])
    assert np.abs(videos[0] - videos[2]).mean() > 1e-3
