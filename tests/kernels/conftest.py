"""Tests marked `gpu` are skipped where there is none."""

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a GPU."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
