import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from echovideo import EchoVideoPipeline, IdentityImageTextFusion
from echovideo.errors import WeightsError
from echovideo.model import folder as model_folder
from echovideo.model.card import TINY, ModelCard, folder_digest, read_card, resolve_folder

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def latents(pipeline: EchoVideoPipeline) -> torch.Tensor:
    face = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    return pipeline(
        prompt="a person waves",
        face_image=face,
        face_embedding=torch.ones(1, 128),
        generator=torch.Generator().manual_seed(3),
        **CALL,
    ).frames


def test_pipeline_saved_and_loaded_renders_the_same_latents(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = EchoVideoPipeline.from_pretrained(tiny_folder)
    pipeline.save_pretrained(tmp_path)
    shutil.copytree(tiny_folder / "face_encoder", tmp_path / "face_encoder")
    again = EchoVideoPipeline.from_pretrained(tmp_path)
    assert torch.equal(latents(pipeline), latents(again))
    assert {path.name for path in tmp_path.iterdir()} == {
        "transformer",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "clip_visual_encoder",
        "face_encoder",
    }
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_fusion_alone_loads_its_part_of_a_transformer_folder(tiny_folder: Path) -> None:
    fusion = IdentityImageTextFusion.from_pretrained(tiny_folder / "transformer")
    transformer = model_folder.load_transformer(tiny_folder, dtype=torch.float32)
    assert type(fusion) is IdentityImageTextFusion
    assert torch.equal(fusion.text_proj.weight, transformer.text_proj.weight)
    assert sum(p.numel() for p in fusion.parameters()) < sum(p.numel() for p in transformer.parameters()) / 4


def test_image_encoder_with_older_names_and_a_text_tower_loads(copy: Path) -> None:
    path = copy / "clip_visual_encoder" / "model.safetensors"
    expected = load_file(path)
    older = {f"vision_model.{name}": tensor for name, tensor in expected.items()}
    save_file({**older, "text_model.embeddings.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}, path)
    loaded = model_folder.load_image_encoder(copy, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "part", ["transformer", "vae", "text_encoder", "clip_visual_encoder", "tokenizer", "scheduler"]
)
def test_folder_without_a_part_is_refused_by_its_name(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(WeightsError, match=part):
        EchoVideoPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("transformer/config.json", "[]"),
        ("scheduler/scheduler_config.json", "{"),
        ("model_card.json", "\xff"),
        ("model_card.json", '{"name": "later", "age": 1}'),
        ("vae/diffusion_pytorch_model.safetensors.index.json", '{"weight_map": '),
    ],
)
def test_folder_with_a_damaged_file_is_refused_by_its_name(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content, encoding="latin-1")

    def opened() -> EchoVideoPipeline:
        read_card(copy)
        return EchoVideoPipeline.from_pretrained(copy)

    with pytest.raises(WeightsError, match=file):
        opened()


def test_folder_of_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no model folder"):
        resolve_folder(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="my models/EchoVideo is no local folder"):
        resolve_folder("my models/EchoVideo")


def test_digest_changes_with_any_byte_and_not_with_hidden_files(copy: Path) -> None:
    digest = folder_digest(copy)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "lock").write_text("x")
    assert folder_digest(copy) == digest
    card = copy / "model_card.json"
    card.write_text(card.read_text() + " ")
    assert folder_digest(copy) != digest


def test_card_of_tiny_says_drawn_and_without_one_is_the_published_model(tiny_folder: Path, tmp_path: Path) -> None:
    assert read_card(tiny_folder) == TINY
    assert "drawn" in TINY.notice
    assert read_card(tmp_path) == ModelCard(name="EchoVideo-5B", licence="CC BY-NC 4.0")
