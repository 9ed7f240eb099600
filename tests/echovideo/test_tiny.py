import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from echovideo import EchoVideoPipeline
from echovideo.errors import WeightsError
from echovideo.model.card import folder_digest
from echovideo.tiny import folder
from echovideo.tiny.folder import ensure_tiny


def test_tiny_model_has_at_most_13_million_parameters(tiny_folder: Path) -> None:
    pipeline = EchoVideoPipeline.from_pretrained(tiny_folder)
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder)
    assert 10e6 < sum(p.numel() for part in parts for p in part.parameters()) <= 13e6


def test_tiny_model_built_in_another_process_is_the_same_to_the_byte(tiny_folder: Path, tmp_path: Path) -> None:
    # In a process of its own with another hash seed, where sets have another order.
    script = "import sys, pathlib, echovideo.tiny.folder as folder; folder.build_tiny(pathlib.Path(sys.argv[1]))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "again")], env=environment, check=True)
    assert folder_digest(tmp_path / "again") == folder_digest(tiny_folder)


def test_tiny_model_present_is_not_built_again(tiny_folder: Path) -> None:
    before = (tiny_folder / "model_card.json").stat().st_mtime_ns
    assert ensure_tiny(tiny_folder.parent) == tiny_folder
    assert (tiny_folder / "model_card.json").stat().st_mtime_ns == before
    assert [path.name for path in tiny_folder.parent.iterdir()] == [tiny_folder.name]


def test_tiny_model_cut_off_on_disk_is_refused_and_named(tiny_folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / tiny_folder.name
    shutil.copytree(tiny_folder, kept)
    assert ensure_tiny(tmp_path) == kept
    weights = kept / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightsError, match=f"{kept} is damaged; delete"):
        ensure_tiny(tmp_path)


def test_tiny_model_of_other_shipped_weights_lies_elsewhere(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder.WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr(folder, "WEIGHTS", tmp_path / "weights")
    assert folder.tiny_folder(tiny_folder.parent) == tiny_folder
    (tmp_path / "weights" / "transformer.safetensors").write_bytes(b"of a later release")
    assert folder.tiny_folder(tiny_folder.parent) != tiny_folder


def test_tiny_tokenizer_every_language_has_tokens_and_ends_with_the_end_token(tiny_folder: Path) -> None:
    tokenizer = EchoVideoPipeline.from_pretrained(tiny_folder).tokenizer
    assert tokenizer is not None
    for text in ("a woman smiles", "女の人が笑う", "eine Frau lächelt 🙂"):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
