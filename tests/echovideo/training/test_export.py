"""What training made, as a model folder and as an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from echovideo.errors import StorageError, TrainingError
from echovideo.model.card import ModelCard, read_card, write_card
from echovideo.model.folder import load_transformer, save_transformer
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.training.adapters import Adapter, merge
from echovideo.training.checkpoint import Checkpoints
from echovideo.training.export import export_adapter, export_model
from echovideo.training.loop import train
from echovideo.training.settings import AdapterSettings, StageSettings
from tests.echovideo.training.small import SmallSource, null_condition, schedule, settings, small_model

CARD = ModelCard(name="base", licence="CC BY-NC 4.0", judged=False)


def _trained(folder: Path, chosen: StageSettings) -> tuple[EchoVideoTransformer3DModel, Path, Path]:
    """Write a base folder, train from it, and return the trained model, the base and the checkpoint."""
    base = folder / "base"
    save_transformer(small_model(), base)
    write_card(CARD, base)
    (base / "vae").mkdir()
    (base / "vae" / "config.json").write_text("{}")
    model, checkpoints = small_model(), Checkpoints(folder / "checkpoints", chosen, "b" * 64)
    train(model, schedule(), SmallSource(), null_condition(), chosen, checkpoints=checkpoints)
    best = checkpoints.best()
    assert best is not None
    return model, base, best


def test_export_model_is_the_base_with_the_trained_transformer_and_its_licence(tmp_path: Path) -> None:
    trained, base, checkpoint = _trained(tmp_path, settings(steps=2))
    export_model(checkpoint, base, tmp_path / "new", name="stage-two", dtype=torch.float32)
    found = load_transformer(tmp_path / "new", dtype=torch.float32)
    for name, parameter in trained.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    assert read_card(tmp_path / "new") == ModelCard(name="stage-two", licence="CC BY-NC 4.0", judged=False)
    assert (tmp_path / "new" / "vae" / "config.json").read_text() == "{}"
    with pytest.raises(StorageError, match="is there already"):
        export_model(checkpoint, base, tmp_path / "new", name="again", dtype=torch.float32)


def test_export_adapter_makes_of_the_base_what_was_trained(tmp_path: Path) -> None:
    chosen = settings(steps=3, groups=("fusion",), adapter=AdapterSettings(rank=2), learning_rate=1e-2)
    trained, base, checkpoint = _trained(tmp_path, chosen)
    path = tmp_path / "person.safetensors"
    export_adapter(checkpoint, base, path, chosen, base_digest="b" * 64, consent_id="consent-3", dtype=torch.float32)
    adapter = Adapter.load(path)
    assert (adapter.card.licence, adapter.card.consent_id, adapter.card.rank) == ("CC BY-NC 4.0", "consent-3", 2)
    model = load_transformer(base, dtype=torch.float32)
    merge(model, adapter, "b" * 64)
    layer = trained.get_submodule("transformer_blocks.1.attn1.to_v")
    expected = layer.weight + layer.lora_up @ layer.lora_down
    assert torch.allclose(model.transformer_blocks[1].attn1.to_v.weight, expected, atol=1e-6)
    assert torch.equal(model.text_proj.weight, trained.text_proj.weight)
    assert not torch.equal(expected, layer.weight)


def test_export_of_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    _, base, checkpoint = _trained(tmp_path, replace(settings(), steps=1))
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(TrainingError, match="is damaged: __0_0"):
        export_model(checkpoint, base, tmp_path / "new", name="x", dtype=torch.float32)
    assert not (tmp_path / "new").exists()
