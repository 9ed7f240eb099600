from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from echovideo.errors import WeightsError
from echovideo.model import weights
from echovideo.model.weights import load_weights, save_weights


class Tied(nn.Module):
    """Two layers, and one embedding under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.shared = nn.Embedding(5, 3)
        self.copy = nn.Embedding(5, 3)
        self.copy.weight = self.shared.weight


FILE = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Tied, Path]:
    module = Tied()
    save_weights(module, tmp_path, {"a": 1}, "model")
    return module, tmp_path


def load_on_meta(folder: Path, **options: object) -> Tied:
    with torch.device("meta"):
        module = Tied()
    load_weights(module, folder, dtype=torch.float32, **options)
    return module


def test_weights_saved_and_loaded_are_equal_and_stay_tied(saved: tuple[Tied, Path]) -> None:
    module, folder = saved
    loaded = load_on_meta(folder)
    assert torch.equal(loaded.first.weight, module.first.weight)
    assert loaded.shared.weight is loaded.copy.weight
    assert set(load_file(folder / FILE)) == {"first.weight", "first.bias", "shared.weight"}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_dtype_is_the_one_asked_for(saved: tuple[Tied, Path]) -> None:
    module = Tied()
    load_weights(module, saved[1], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_weights_several_shards_are_found_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SHARD_BYTES", 64)
    module = Tied()
    save_weights(module, tmp_path, {}, "model")
    assert len(list(tmp_path.glob("model-*-of-00002.safetensors"))) == 2
    assert torch.equal(load_on_meta(tmp_path).shared.weight, module.shared.weight)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.safetensors is missing"):
        load_on_meta(tmp_path)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = {**load_file(folder / FILE), **{name.replace("_", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / FILE)


def test_weights_missing_tensor_is_named(saved: tuple[Tied, Path]) -> None:
    change(saved[1], first_bias=None)
    with pytest.raises(WeightsError, match=r"lacks 1 tensors of Tied, among them 'first.bias'"):
        load_on_meta(saved[1])


def test_weights_extra_tensor_is_named_unless_a_subset_is_wanted(saved: tuple[Tied, Path]) -> None:
    change(saved[1], second_bias=torch.zeros(2))
    with pytest.raises(WeightsError, match=r"model.safetensors holds the tensor 'second.bias'"):
        load_on_meta(saved[1])
    load_on_meta(saved[1], subset=True)


def test_weights_misshapen_tensor_is_named_with_both_shapes(saved: tuple[Tied, Path]) -> None:
    change(saved[1], first_bias=torch.zeros(7))
    with pytest.raises(WeightsError, match=r"'first.bias' has shape \(7,\), expected \(4,\)"):
        load_on_meta(saved[1])


@pytest.mark.parametrize("size", [0, 5, 40, 200])
def test_weights_truncated_file_is_named(saved: tuple[Tied, Path], size: int) -> None:
    path = saved[1] / FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsError, match=r"model.safetensors is truncated or not safetensors"):
        load_on_meta(saved[1])


def test_weights_pickle_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin is a pickle"):
        load_on_meta(tmp_path)


def test_weights_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds no safetensors file"):
        load_on_meta(tmp_path)


def test_weights_two_files_without_index_are_refused(saved: tuple[Tied, Path]) -> None:
    (saved[1] / "other.safetensors").write_bytes((saved[1] / FILE).read_bytes())
    with pytest.raises(WeightsError, match="holds 2 safetensors files and no index"):
        load_on_meta(saved[1])
