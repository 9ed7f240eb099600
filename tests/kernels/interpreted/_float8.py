"""Conversion to float8_e4m3fn as the hardware does it, for Triton's interpreter."""

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


def convert_as_hardware_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter PyTorch's conversion: its own gets subnormals, NaN and roundings to a power of 2 wrong."""
    original = interpreter._convert_float

    def convert(value: np.ndarray, from_type: Any, to_type: Any, rounding: Any) -> np.ndarray:
        if str(to_type) != "fp8e4nv":
            return original(value, from_type, to_type, rounding)
        clamped = torch.from_numpy(value.astype(np.float32)).clamp(-448, 448)
        return clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
