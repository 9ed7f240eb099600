from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from echovideo.faces.recogniser import load_recogniser
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import sample_conditions, scene_curves
from echovideo.synthetic.draw import draw_tensors
from echovideo.synthetic.person import SPLITS, identity_parameters
from echovideo.tiny import world as world_module
from echovideo.tiny.world import PHOTOS, Encoders, Whitening, World, WorldSource, encode_world, latent_share
from echovideo.training.batch import TrainingBatch
from echovideo.training.settings import StageSettings, stage_two

SETTINGS = stage_two(steps=4, batch_size=8, seed=3)


@pytest.fixture
def whitening(world: World) -> Whitening:
    return Whitening.of(world.embedding_NPD)


def joined(parts: list[TrainingBatch]) -> dict[str, torch.Tensor]:
    return {field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(TrainingBatch)}


def photo_numbers(world: World, settings: StageSettings, whitening: Whitening) -> set[int]:
    batch = WorldSource(world, whitening, settings).batch(0, 0, 1)
    equal = (world.tokens_NPTD[None] == batch.face_tokens_BND[:, None, None]).all(dim=(3, 4))
    return set(equal.nonzero()[:, 2].tolist())


@pytest.mark.parametrize("world_size", [2, 4])
def test_world_source_any_world_size_gives_the_same_examples(
    world: World, whitening: Whitening, world_size: int
) -> None:
    source = WorldSource(world, whitening, SETTINGS)
    whole = joined([source.batch(5, 0, 1)])
    shared = joined([source.batch(5, rank, world_size) for rank in range(world_size)])
    for name, tensor in whole.items():
        assert torch.equal(tensor, shared[name]), name


def test_world_source_batch_is_a_function_of_its_step_and_seed(world: World, whitening: Whitening) -> None:
    source = WorldSource(world, whitening, SETTINGS)
    first, other = source.batch(5, 0, 1), source.batch(6, 0, 1)
    again = WorldSource(world, whitening, SETTINGS).batch(5, 0, 1)
    assert torch.equal(first.seed_B, again.seed_B)
    assert torch.equal(first.latents_BFCHW, again.latents_BFCHW)
    assert not torch.equal(first.seed_B, other.seed_B)
    elsewhere = WorldSource(world, whitening, replace(SETTINGS, seed=4)).batch(5, 0, 1)
    assert not torch.equal(first.seed_B, elsewhere.seed_B)


def test_world_source_references_come_from_other_clips_or_the_clip_itself(world: World, whitening: Whitening) -> None:
    many = replace(SETTINGS, batch_size=32)
    assert photo_numbers(world, many, whitening) == set(range(PHOTOS - 1))
    assert photo_numbers(world, replace(many, references="in_clip"), whitening) == {PHOTOS - 1}


def test_world_source_example_has_caption_photo_and_face_of_one_clip(world: World, whitening: Whitening) -> None:
    batch = WorldSource(world, whitening, SETTINGS).batch(0, 0, 1)
    clip = (world.latents_NFCHW[None] == batch.latents_BFCHW[:, None]).flatten(2).all(dim=2).nonzero()[:, 1]
    photo = (world.tokens_NPTD[clip] == batch.face_tokens_BND[:, None]).flatten(2).all(dim=2).nonzero()[:, 1]
    said = (world.text_NCTD[clip] == batch.text_BND[:, None]).flatten(2).all(dim=2)
    assert said.any(dim=1).all()
    assert torch.equal(batch.face_mean_BCHW, world.mean_NPCHW[clip, photo])
    mapped = world.embedding_NPD[clip, photo] @ whitening.matrix_DD.T
    torch.testing.assert_close(batch.embedding_BD, mapped.bfloat16())
    torch.testing.assert_close(batch.face_share_BFHW, world.share_NFHW[clip].float() / 255)


def test_whitening_folded_layer_gives_for_raw_embeddings_what_it_gave_for_mapped_ones(world: World) -> None:
    whitening = Whitening.of(world.embedding_NPD)
    layer = nn.Linear(128, 32)
    whitening.begin(layer)
    raw = world.embedding_NPD[:, 0]
    mapped = raw @ whitening.matrix_DD.T
    expected = layer(mapped)
    # It begins with centred embeddings.
    torch.testing.assert_close(expected.mean(dim=0), torch.zeros(32), atol=1e-3, rtol=0)
    weight = layer.weight.detach().clone()
    whitening.fold(layer)
    torch.testing.assert_close(layer(raw), expected, atol=1e-3, rtol=1e-3)
    whitening.unfold(layer)
    torch.testing.assert_close(layer.weight, weight, atol=1e-4, rtol=1e-3)


def test_whitening_spread_over_people_is_one_on_average(world: World) -> None:
    whitening = Whitening.of(world.embedding_NPD)
    mapped = world.embedding_NPD[:, 0] @ whitening.matrix_DD.T
    assert float(mapped.std(dim=0).mean()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(mapped.mean(dim=0), whitening.mean_D, atol=1e-3, rtol=1e-3)


def test_latent_share_is_the_mean_of_each_cells_frames_and_pixels() -> None:
    share = torch.zeros(1, 9, 16, 24)
    share[0, 0, :8, :8] = 1
    share[0, 1, 8:, 16:] = 1
    share[0, 5:, :4, :8] = 1
    cells = latent_share(share)
    assert cells.shape == (1, 3, 2, 3)
    assert cells[0, 0].tolist() == [[1, 0, 0], [0, 0, 0]]
    assert cells[0, 1].tolist() == [[0, 0, 0], [0, 0, 0.25]]
    assert cells[0, 2].tolist() == [[0.5, 0, 0], [0, 0, 0]]


def test_encode_world_in_chunks_is_the_clips_their_captions_and_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = Encoders.shipped(load_recogniser(), torch.device("cpu"))
    monkeypatch.setattr(world_module, "FRAMES", 1)
    monkeypatch.setattr(world_module, "SIDE", 48)

    def encoded(chunk: int) -> World:
        monkeypatch.setattr(world_module, "_CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        return encode_world(encoders, SPLITS["train"][:3], 30, generator, compiled=False)

    whole, parts = encoded(3), encoded(2)
    torch.testing.assert_close(parts.latents_NFCHW, whole.latents_NFCHW, rtol=0.05, atol=0.05)
    torch.testing.assert_close(parts.share_NFHW, whole.share_NFHW)
    assert whole.latents_NFCHW.shape == (3, 1, 16, 6, 6)
    assert whole.tokens_NPTD.shape == (3, PHOTOS, 196, 128)
    assert whole.mean_NPCHW.shape == (3, PHOTOS, 16, 12, 12)
    # Clips have every third seed from the first on; the seeds between are their photos'.
    conditions = sample_conditions([30, 33, 36])
    said = encoders.text(encoders.tokens([caption(condition, seed=condition.seed) for condition in conditions]))
    torch.testing.assert_close(whole.text_NCTD[:, 0], said, rtol=0.05, atol=0.05)
    drawing = draw_tensors(identity_parameters(torch.tensor(SPLITS["train"][:3])), scene_curves(conditions, 1), 48, 48)
    video = drawing.frames_BFCHW.transpose(1, 2) * 2 - 1
    latents = encoders.vae.encode(video.bfloat16()).latent_dist.mean * encoders.scaling_factor  # type: ignore[operator]
    torch.testing.assert_close(whole.latents_NFCHW, latents.transpose(1, 2), rtol=0.05, atol=0.05)
