"""The transformer's configuration: what is read, and the sizes that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from echovideo.errors import WeightsError
from echovideo.model.config import TransformerConfig, read_config
from echovideo.request import SIZES


def test_config_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert read_config(tmp_path) == {"a": 1}


def test_sizes_of_the_published_model_are_the_five_named_ones() -> None:
    assert TransformerConfig().sizes == SIZES
    assert TransformerConfig(sample_height=60, sample_width=60).sizes == SIZES


def test_sizes_of_a_smaller_model_are_its_own() -> None:
    assert TransformerConfig(sample_height=12, sample_width=20).sizes == {"160x96": (96, 160)}


@pytest.mark.parametrize(("cells", "name"), [({}, "wide"), ({"sample_height": 12, "sample_width": 20}, "160x96")])
def test_default_size_is_the_first_of_the_model_s_own(cells: dict[str, int], name: str) -> None:
    assert TransformerConfig(**cells).default_size == name
