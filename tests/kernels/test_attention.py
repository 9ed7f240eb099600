import pytest
import torch

from echovideo_kernels import attention


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_strided_inputs_match_softmax_in_float64(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 37, 3, 5, 16, generator=generator)
    q, k, v = packed.unbind(2)
    expected_scale = scale if scale is not None else 16**-0.5
    q64, k64, v64 = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    expected = (torch.softmax(expected_scale * q64 @ k64.mT, dim=-1) @ v64).transpose(1, 2)
    out = attention(q, k, v, scale)
    assert out.shape == (2, 37, 5, 16)
    assert float((out - expected).norm() / expected.norm()) < 1e-6
