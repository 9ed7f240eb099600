"""Registered identities in a folder and on S3: written once, checked when used, listed when a name is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from echovideo.errors import RequestError, StorageError
from echovideo.request import RenderRequest
from echovideo.training.adapters import Adapter, AdapterCard
from pipelines.identities import Identities, IdentityCard, file_sha256
from pipelines.storage import StoragePath

ROW = RenderRequest(row_id="r", prompt="p", photo_bytes=b"", identity_lora="anna", consent_id="c-1")


def write_adapter(path: Path, value: float = 1.0) -> Path:
    card = AdapterCard(
        rank=1, groups=("fusion",), adapted_groups=(), base_digest="base", licence="CC BY-NC 4.0", consent_id="c-1"
    )
    Adapter(card=card, tensors={"text_proj.bias": torch.full((2,), value)}).save(path)
    return path


def card_of(adapter: Path, name: str = "anna") -> IdentityCard:
    sha256 = file_sha256(adapter)
    return IdentityCard(
        name=name,
        file=f"adapter-{sha256[:16]}.safetensors",
        sha256=sha256,
        model="tiny",
        base_digest="base",
        licence="CC BY-NC 4.0",
        consent_id="c-1",
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter.safetensors")


@pytest.fixture
def registered(root: StoragePath, adapter: Path) -> StoragePath:
    """An output root with the identity "anna"."""
    Identities(root).register(card_of(adapter), adapter)
    return root


def test_registered_adapter_is_found_and_loaded_with_its_card(registered: StoragePath, adapter: Path) -> None:
    identities = Identities(registered)
    assert identities.names() == ["anna"]
    assert identities.find("anna") == card_of(adapter)
    loaded = identities.load(identities.find("anna"))
    assert loaded.tensors["text_proj.bias"].tolist() == [1.0, 1.0]
    assert (loaded.card.licence, loaded.card.consent_id) == ("CC BY-NC 4.0", "c-1")
    assert identities.named([ROW, replace(ROW, row_id="s", identity_lora=None)]) == {"anna": card_of(adapter)}


def test_name_that_is_taken_keeps_its_adapter(registered: StoragePath, adapter: Path, tmp_path: Path) -> None:
    assert Identities(registered).register(card_of(adapter), adapter) == card_of(adapter)
    other = write_adapter(tmp_path / "other.safetensors", 2.0)
    with pytest.raises(StorageError, match="choose another name") as caught:
        Identities(registered).register(card_of(other), other)
    assert caught.value.code == "identity_exists"
    assert Identities(registered).find("anna") == card_of(adapter)
    assert (registered / "identities" / "anna").list_names() == [card_of(adapter).file, "card.json"]


def test_adapter_of_other_bytes_than_its_card_says_is_refused(registered: StoragePath) -> None:
    card = Identities(registered).find("anna")
    (registered / "identities" / "anna" / card.file).write_bytes(b"something else")
    with pytest.raises(StorageError, match="train it again") as caught:
        Identities(registered).load(card)
    assert caught.value.code == "damaged"


@pytest.mark.parametrize(
    ("change", "model_digest", "code", "message"),
    [
        ({"identity_lora": "ann"}, "base", "unknown_identity", "there are: anna"),
        ({"consent_id": "c-2"}, "base", "identity_consent", "'c-2'"),
        ({"consent_id": None}, "base", "identity_consent", "None"),
        ({}, "another", "identity_base", "trained on tiny"),
    ],
)
def test_row_that_may_not_use_an_identity_is_refused(
    tmp_path: Path, adapter: Path, change: dict[str, str | None], model_digest: str, code: str, message: str
) -> None:
    identities = Identities(StoragePath.parse(str(tmp_path / "root")))
    identities.register(card_of(adapter), adapter)
    identities.check(ROW, "base")
    with pytest.raises(RequestError, match=message) as caught:
        identities.check(replace(ROW, **change), model_digest)
    assert caught.value.code == code


def test_identity_that_is_deleted_leaves_nothing_though_it_was_stopped_half_way(
    registered: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(registered), "delete_tree", None)
        with pytest.raises(TypeError):
            Identities(registered).delete("anna")
    Identities(registered).delete("anna")
    assert (registered / "identities").list_files() == []
    with pytest.raises(RequestError, match="there are: none"):
        Identities(registered).find("anna")
