"""The drawn world as training examples: clips, captions and reference photos, encoded once and kept on the device."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase, SiglipVisionModel, T5EncoderModel

from echovideo.conditioning import TEMPORAL_COMPRESSION
from echovideo.faces.recogniser import DlibFaceRecogniser
from echovideo.hashing import hashed, uniform
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import CURVES, ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import Drawing, draw_tensors
from echovideo.synthetic.person import identity_parameters
from echovideo.tiny.drawing import noisy_points, reference_faces, split_frames
from echovideo.tiny.faces import recognition_crop
from echovideo.tiny.parts import FRAMES, SIDE, TEXT_TOKENS
from echovideo.tiny.shipped import load_image_encoder, load_text_encoder, load_tokenizer, load_vae
from echovideo.training.batch import NullCondition, TrainingBatch, example_seeds
from echovideo.training.settings import StageSettings

CAPTIONS, PHOTOS = 2, 3
"""Captions of each clip; reference photos: two of other occasions, and one from the clip itself."""
_CLOSER = 1.5
_CELL = 8
_CHUNK = 128
_PICK, _CAPTION, _PHOTO = 1 << 15, 1 << 16, 1 << 17
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoders:
    """The tiny model's frozen parts, on one device, in bfloat16 but for the recogniser; the tokenizer beside them."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    image_encoder: SiglipVisionModel
    vae: torch.nn.Module
    recogniser: DlibFaceRecogniser
    scaling_factor: float

    @classmethod
    def shipped(cls, recogniser: DlibFaceRecogniser, device: torch.device) -> Encoders:
        """Return the shipped parts and the recogniser given."""
        vae = load_vae()
        return cls(
            tokenizer=load_tokenizer(),
            text_encoder=load_text_encoder().to(device, torch.bfloat16).requires_grad_(False),
            image_encoder=load_image_encoder().to(device, torch.bfloat16).requires_grad_(False),
            vae=vae.to(device, torch.bfloat16).requires_grad_(False),
            recogniser=recogniser.to(device),
            scaling_factor=vae.config.scaling_factor,
        )

    @torch.no_grad()
    def text(self, tokens_BN: Tensor) -> Tensor:
        """Return T5's states (B, 96, 128) of token numbers."""
        states: Tensor = self.text_encoder(tokens_BN.to(self.text_encoder.device))[0]
        return states

    def tokens(self, captions: list[str]) -> Tensor:
        """Return captions' token numbers (B, 96) int64, padded, on the CPU."""
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        numbers: Tensor = encoded.input_ids
        return numbers

    @torch.no_grad()
    def null(self) -> NullCondition:
        """Return what a dropped condition is replaced with."""
        like = next(self.image_encoder.parameters())
        side = self.image_encoder.config.image_size
        black = torch.full((1, 3, side, side), -1.0, device=like.device, dtype=like.dtype)
        return NullCondition(
            text_1ND=self.text(self.tokens([""])), face_tokens_1ND=self.image_encoder(black).last_hidden_state
        )

    @torch.no_grad()
    def photos(self, drawing: Drawing, generator: torch.Generator) -> Photos:
        """Return what a drawing's frames, as reference photos of their people, become."""
        points = noisy_points(drawing, generator)
        faces = reference_faces(drawing, points)
        like = torch.bfloat16
        posterior = self.vae.encode((faces.latents_BCHW * 2 - 1)[:, :, None].to(like)).latent_dist  # type: ignore[operator]
        return Photos(
            tokens_BND=self.image_encoder((faces.tokens_BCHW * 2 - 1).to(like)).last_hidden_state,
            embedding_BD=self.recogniser(recognition_crop(drawing, points)),
            mean_BCHW=posterior.mean[:, :, 0],
            std_BCHW=posterior.std[:, :, 0],
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Photos:
    """B encoded reference photos: vision tokens, raw embedding, moments of the face's posterior."""

    tokens_BND: Tensor  # noqa: N815
    embedding_BD: Tensor  # noqa: N815
    mean_BCHW: Tensor  # noqa: N815
    std_BCHW: Tensor  # noqa: N815


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class World:
    """N encoded clips, each of another person, with CAPTIONS captions and PHOTOS photos each; on the device.

    `latents_NFCHW`, scaled, and `text_NCTD`, the captions' states, are bfloat16; `share_NFHW` uint8, 255 all face;
    photos are as Photos has them, (N, PHOTOS, ...).
    """

    latents_NFCHW: Tensor  # noqa: N815
    text_NCTD: Tensor  # noqa: N815
    share_NFHW: Tensor  # noqa: N815
    tokens_NPTD: Tensor  # noqa: N815
    embedding_NPD: Tensor  # noqa: N815
    mean_NPCHW: Tensor  # noqa: N815
    std_NPCHW: Tensor  # noqa: N815


def closer(scene_BFS: Tensor) -> Tensor:
    """Return the scene with the camera closer, as photos of faces are taken."""
    scene = scene_BFS.clone()
    scene[:, :, CURVES.index("zoom")] *= _CLOSER
    return scene


def photo_scene(conditions: list[ClipCondition]) -> Tensor:
    """Return the scene tensor (B, 1, curves) of photos: the middle of a clip, from closer."""
    return closer(scene_curves(conditions, 3)[:, 1:2])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Chunk:
    """What the CPU makes of some people: their seeds (B,), scenes (B, frames and photos, curves), captions' tokens."""

    seeds_B: Tensor  # noqa: N815
    scene_BFS: Tensor  # noqa: N815
    tokens_BCT: Tensor  # noqa: N815

    def to(self, device: torch.device) -> _Chunk:
        """Return it on the device, copied without waiting for what the device is at."""
        if device.type != "cuda":
            return self
        moved = {name: getattr(self, name).pin_memory() for name in (field.name for field in fields(self))}
        return _Chunk(**{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})


def _prepared(encoders: Encoders, people: range, first_clip: int) -> Iterator[_Chunk]:
    """Yield the chunks of the people; a thread makes the next one while the caller has the last."""

    def prepare(start: int) -> _Chunk:
        seeds = people[start : start + _CHUNK]
        number = range(first_clip + PHOTOS * start, first_clip + PHOTOS * (start + len(seeds)))
        conditions, *others = (sample_conditions(number[kind::PHOTOS]) for kind in range(PHOTOS))
        scene = scene_curves(conditions, FRAMES)
        # One drawing of one shape: the clip, two photos of other occasions, and a frame of the clip from closer.
        middle = scene[:, FRAMES // 2 : FRAMES // 2 + 1]
        said = [
            encoders.tokens([caption(c, seed=c.seed + variant * 7_919) for c in conditions])
            for variant in range(CAPTIONS)
        ]
        return _Chunk(
            seeds_B=torch.tensor(list(seeds)),
            scene_BFS=torch.cat([scene, *(photo_scene(other) for other in others), closer(middle)], dim=1),
            tokens_BCT=torch.stack(said, dim=1),
        )

    with ThreadPoolExecutor(max_workers=1) as thread:
        starts = range(0, len(people), _CHUNK)
        coming = thread.submit(prepare, starts[0])
        for start in starts[1:]:
            ready, coming = coming.result(), thread.submit(prepare, start)
            yield ready
        yield coming.result()


@torch.no_grad()
def encode_world(
    encoders: Encoders, people: range, first_clip: int, generator: torch.Generator, *, compiled: bool
) -> World:
    """Draw a clip and photos of each person and encode them; the clips have the seeds from `first_clip` on."""
    device = generator.device
    parts: list[tuple[Tensor, ...]] = []
    began = told = time.monotonic()
    done = 0
    for prepared in _prepared(encoders, people, first_clip):
        chunk = prepared.to(device)
        drawing = draw_tensors(identity_parameters(chunk.seeds_B), chunk.scene_BFS, SIDE, SIDE, compiled=compiled)
        clip, photos = split_frames(drawing, FRAMES)
        video = clip.frames_BFCHW.transpose(1, 2) * 2 - 1
        posterior = encoders.vae.encode(video.bfloat16()).latent_dist  # type: ignore[operator]
        encoded = encoders.photos(photos, generator)
        parts.append(
            (
                (posterior.mean * encoders.scaling_factor).transpose(1, 2),
                encoders.text(chunk.tokens_BCT.flatten(0, 1)).unflatten(0, (-1, CAPTIONS)),
                (latent_share(clip.face_BFHW) * 255).round().byte(),
                *(getattr(encoded, field.name).unflatten(0, (-1, PHOTOS)) for field in fields(encoded)),
            )
        )
        done += len(chunk.seeds_B)
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            print(
                f"world: {done}/{len(people)}, {done / (told - began):.0f} clips a second", file=sys.stderr, flush=True
            )
    return World(
        **{field.name: torch.cat(part) for field, part in zip(fields(World), zip(*parts, strict=True), strict=True)}
    )


def latent_share(share_BFHW: Tensor) -> Tensor:
    """Return the mean share in each latent cell (B, 1 + (F - 1) / 4, H / 8, W / 8): the first frame has cells alone."""
    small = F.avg_pool2d(share_BFHW, _CELL)
    rest = small[:, 1:].unflatten(1, (-1, TEMPORAL_COMPRESSION)).mean(dim=2)
    return torch.cat([small[:, :1], rest], dim=1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Whitening:
    """The linear map (D, D) that gives embeddings the same spread within one person in every direction.

    `mean_D` is the mean embedding after the map. It is not subtracted: a dropped identity is the zero embedding.
    """

    matrix_DD: Tensor  # noqa: N815
    mean_D: Tensor  # noqa: N815

    @classmethod
    def of(cls, embedding_NPD: Tensor) -> Whitening:
        """Return the map fitted to two photos of each of N people; the spread over people becomes 1 on average."""
        first, second = embedding_NPD[:, 0].double(), embedding_NPD[:, 1].double()
        difference = (first - second) / 2**0.5
        within = difference.T @ difference / len(difference)
        values, vectors = torch.linalg.eigh(within)
        # The smallest directions are noise of the fit.
        root = vectors @ torch.diag((values + values.mean() * 0.1).rsqrt()) @ vectors.T
        matrix = root / (first @ root.T).std(dim=0).mean()
        return cls(matrix_DD=matrix.float(), mean_D=(first @ matrix.T).mean(dim=0).float())

    @torch.no_grad()
    def begin(self, projection: torch.nn.Linear) -> None:
        """Set the bias of a fresh first layer so that it begins with centred embeddings."""
        assert projection.bias is not None
        projection.bias.copy_(-(projection.weight.float() @ self.mean_D.to(projection.weight.device)))

    @torch.no_grad()
    def fold(self, projection: torch.nn.Linear) -> None:
        """Let a layer that was trained on mapped embeddings take raw ones."""
        projection.weight.copy_(projection.weight.float() @ self.matrix_DD.to(projection.weight.device))

    @torch.no_grad()
    def unfold(self, projection: torch.nn.Linear) -> None:
        """Let a layer that takes raw embeddings be trained on mapped ones."""
        matrix = self.matrix_DD.to(projection.weight.device)
        projection.weight.copy_(torch.linalg.solve(matrix, projection.weight.float(), left=False))


class WorldSource:
    """An ExampleSource over a World: each example a clip, one of its captions and one of its photos, by chance."""

    def __init__(self, world: World, whitening: Whitening, settings: StageSettings) -> None:
        self._world, self._settings = world, settings
        self._embedding = (world.embedding_NPD @ whitening.matrix_DD.T).bfloat16()

    @torch.no_grad()
    def batch(self, step: int, rank: int, world_size: int) -> TrainingBatch:
        """Return the slice of one process of the examples of global step `step`."""
        world, settings = self._world, self._settings
        each = settings.batch_size // world_size
        places = torch.arange(rank * each, (rank + 1) * each, device=world.latents_NFCHW.device)
        seeds = example_seeds(settings.seed, step, places)
        at = hashed(seeds + _PICK) % len(world.latents_NFCHW)
        said = (uniform(seeds, 1, _CAPTION)[:, 0] * CAPTIONS).long()
        # The last photo is the clip's own.
        others = (uniform(seeds, 1, _PHOTO)[:, 0] * (PHOTOS - 1)).long()
        photo = others if settings.references == "cross_clip" else torch.full_like(others, PHOTOS - 1)
        return TrainingBatch(
            latents_BFCHW=world.latents_NFCHW[at],
            text_BND=world.text_NCTD[at, said],
            face_tokens_BND=world.tokens_NPTD[at, photo],
            embedding_BD=self._embedding[at, photo],
            face_mean_BCHW=world.mean_NPCHW[at, photo],
            face_std_BCHW=world.std_NPCHW[at, photo],
            face_share_BFHW=world.share_NFHW[at].float() / 255,
            seed_B=seeds,
        )
