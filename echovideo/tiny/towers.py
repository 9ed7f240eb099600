"""Trains the tiny model's text encoder and vision tower by contrast: captions with clips, photos of one person."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SiglipVisionModel, T5EncoderModel

from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import sample_conditions, scene_curves
from echovideo.synthetic.draw import draw_tensors
from echovideo.synthetic.person import SPLITS, identity_parameters
from echovideo.tiny.drawing import TEST_CLIPS, noisy_points, split_frames
from echovideo.tiny.faces import face_image
from echovideo.tiny.parts import FACE_TOKENS_SIDE, FRAMES, SIDE, TEXT_TOKENS, fresh_image_encoder, fresh_text_encoder
from echovideo.tiny.progress import THOUSANDTHS, Progress, timed_settings
from echovideo.tiny.world import photo_scene
from echovideo.training.graphed import GraphedGradients
from echovideo.training.optimizer import MasterAdamW

_MOMENTS = (0, FRAMES // 2, FRAMES - 1)
_WIDTH = 128
_TEMPERATURE = 0.07
_CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TowersSettings:
    """How the towers are trained: `people` are drawn once, and each step compares `compared` of them."""

    seconds: float
    seed: int = 2
    people: int = 49_152
    compared: int = 512
    learning_rate: float = 1e-3


class Towers(nn.Module):
    """Both encoders and the two heads that exist for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder: T5EncoderModel = fresh_text_encoder()
        self.image_encoder: SiglipVisionModel = fresh_image_encoder()
        self.text_head = nn.Linear(_WIDTH, _WIDTH)
        self.clip_head = nn.Linear(len(_MOMENTS) * _WIDTH, _WIDTH)

    def embed_text(self, tokens_BN: Tensor, pad: int) -> Tensor:
        """Return unit vectors (B, 128) of captions; padding is attended to, as in use, and not pooled."""
        states = self.text_encoder(tokens_BN)[0]
        said = (tokens_BN != pad)[:, :, None]
        return F.normalize(self.text_head((states * said).sum(1) / said.sum(1)).float(), dim=1)

    def embed_pictures(self, pictures_NCHW: Tensor) -> Tensor:
        """Return (N, 128) of pictures (N, 3, 112, 112), -1 to 1."""
        pooled: Tensor = self.image_encoder(pictures_NCHW.bfloat16()).pooler_output
        return pooled

    def embed_clips(self, clips_BTCHW: Tensor) -> Tensor:
        """Return unit vectors (B, 128) of three frames of each clip (B, 3, 3, 112, 112), -1 to 1."""
        pooled = self.embed_pictures(clips_BTCHW.flatten(0, 1)).unflatten(0, (len(clips_BTCHW), -1))
        embedded: Tensor = self.clip_head(pooled.flatten(1)).float()
        return F.normalize(embedded, dim=1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pictures:
    """Of N people a caption's tokens (N, 96), three frames of its clip, and two photos, uint8 (N, T, 3, 112, 112)."""

    tokens_NT: Tensor  # noqa: N815
    clips_NTCHW: Tensor  # noqa: N815
    photos_NTCHW: Tensor  # noqa: N815

    @classmethod
    def drawn(
        cls, people: range, first_clip: int, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
    ) -> _Pictures:
        """Draw the people; their clips have the seeds from `first_clip` on."""
        parts = []
        for start in range(0, len(people), _CHUNK):
            count = len(people[start : start + _CHUNK])
            seeds = range(first_clip + 3 * start, first_clip + 3 * (start + count))
            parts.append(_drawn(people[start : start + count], seeds, tokenizer, generator))
        tokens, clips, photos = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(tokens_NT=tokens, clips_NTCHW=clips, photos_NTCHW=photos)

    def take(self, at_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens and, from -1 to 1, the clips and photos of some people."""
        clips, photos = (pictures[at_B].float() / 127.5 - 1 for pictures in (self.clips_NTCHW, self.photos_NTCHW))
        return self.tokens_NT[at_B], clips, photos


def _drawn(
    people: range, clips: range, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    device = generator.device
    said, *taken = (sample_conditions(clips[kind::3]) for kind in range(3))
    captions = [caption(condition, seed=condition.seed) for condition in said]
    tokens = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    frames = scene_curves(said, FRAMES)[:, list(_MOMENTS)]
    scene = torch.cat([frames, *(photo_scene(conditions) for conditions in taken)], dim=1).to(device)
    identity = identity_parameters(torch.tensor(list(people), device=device))
    drawing = draw_tensors(identity, scene, SIDE, SIDE, compiled=device.type == "cuda")
    shown, photos = split_frames(drawing, len(_MOMENTS))
    larger = F.interpolate(
        shown.frames_BFCHW.flatten(0, 1), size=FACE_TOKENS_SIDE, mode="bilinear", align_corners=False
    )
    faces = face_image(photos, noisy_points(photos, generator), FACE_TOKENS_SIDE)
    pictures = (_as_bytes(kind).unflatten(0, (len(people), -1)) for kind in (larger, faces))
    return tokens.to(device), *pictures


def train_towers(settings: TowersSettings, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Towers:
    """Return the towers with averaged weights, bfloat16 on `device`."""
    torch.manual_seed(settings.seed)
    towers = Towers().to(device, torch.bfloat16).train().requires_grad_(True)
    told = timed_settings("towers", settings.compared, settings.learning_rate, decay=0.995)
    optimizer = MasterAdamW(towers.named_parameters(), told)
    generator = torch.Generator(device).manual_seed(settings.seed)
    began = time.perf_counter()
    pictures = _Pictures.drawn(SPLITS["train"][: settings.people], 0, tokenizer, generator)
    pad = tokenizer.pad_token_id

    def backward(tokens_BT: Tensor, clips_BTCHW: Tensor, photos_BTCHW: Tensor) -> Tensor:
        described = _contrast(towers.embed_text(tokens_BT, pad), towers.embed_clips(clips_BTCHW))
        first, second = (F.normalize(towers.embed_pictures(photo).float(), dim=1) for photo in photos_BTCHW.unbind(1))
        recognised = _contrast(first, second)
        (described + recognised).backward()
        return torch.stack([described.detach(), recognised.detach()])

    def some() -> tuple[Tensor, Tensor, Tensor]:
        # Nobody twice: two pictures of one person must not count as two people.
        order = torch.randperm(len(pictures.tokens_NT), generator=generator, device=device)
        return pictures.take(order[: settings.compared])

    step: Callable[..., Tensor] = backward
    if device.type == "cuda":
        step = GraphedGradients(backward, list(towers.parameters()), some())
    left = settings.seconds - (time.perf_counter() - began)
    progress = Progress(name="towers", seconds=max(1.0, left))
    while (share := progress.share) < 1:
        losses = step(*some())
        (described, recognised), norm, _ = optimizer.step(int(share * THOUSANDTHS), losses)
        progress.stepped(captions=described, people=recognised, gradient=norm)
    optimizer.finish()
    return towers.eval().requires_grad_(False)


@torch.inference_mode()
def measure_towers(
    towers: Towers, tokenizer: PreTrainedTokenizerBase, device: torch.device, count: int = 256
) -> dict[str, float]:
    """Return how often, among `count` unseen people, a caption finds its clip, and a photo the person's other one."""
    generator = torch.Generator(device).manual_seed(0)
    pictures = _Pictures.drawn(SPLITS["test"][30_000 : 30_000 + count], TEST_CLIPS, tokenizer, generator)
    tokens, clips, photos = pictures.take(torch.arange(count, device=device))
    text = towers.embed_text(tokens, tokenizer.pad_token_id)
    first, second = (F.normalize(towers.embed_pictures(photo).float(), dim=1) for photo in photos.unbind(1))
    right = torch.arange(count, device=device)
    return {
        f"caption finds its clip among {count}": float(
            ((text @ towers.embed_clips(clips).T).argmax(1) == right).float().mean()
        ),
        f"photo finds the person among {count}": float(((first @ second.T).argmax(1) == right).float().mean()),
    }


def _contrast(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Return the mean of both ways' cross-entropy of finding each row's partner (arXiv 1807.03748)."""
    likeness = first_BD @ second_BD.T / _TEMPERATURE
    partner = torch.arange(len(first_BD), device=first_BD.device)
    return (F.cross_entropy(likeness, partner) + F.cross_entropy(likeness.T, partner)) / 2


def _as_bytes(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().byte()
