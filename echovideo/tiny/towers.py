"""Trains the tiny model's text encoder and vision tower by contrast: captions with clips, photos of one person."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SiglipVisionModel, T5EncoderModel

from echovideo.model.config import TransformerConfig
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.person import SPLITS, identity_parameters
from echovideo.tiny.drawing import TEST_CLIPS, draw_people, draw_photos, noisy_points
from echovideo.tiny.faces import face_image
from echovideo.tiny.parts import FACE_TOKENS_SIDE, FRAMES, SIDE, fresh_image_encoder, fresh_text_encoder
from echovideo.tiny.progress import THOUSANDTHS, Progress, timed_settings
from echovideo.training.optimizer import MasterAdamW

_MOMENTS = (0, FRAMES // 2, FRAMES - 1)
_WIDTH = 128
_TEMPERATURE = 0.07
_DRAW_EVERY = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TowersSettings:
    """How the towers are trained: every fourth step draws `fresh` people into a store, and each reads `people`."""

    seconds: float
    seed: int = 2
    people: int = 256
    fresh: int = 96
    kept: int = 6144
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


class _Store:
    """The last drawn people: a caption's tokens, three frames of its clip, and two photos of each, as bytes."""

    def __init__(
        self,
        kept: int,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        generator: torch.Generator,
        people: range,
        first_clip: int,
    ) -> None:
        self._tokenizer, self._device, self._generator = tokenizer, device, generator
        self._people, self._first_clip, self._kept = people, first_clip, kept
        self.drawn = 0
        length = TransformerConfig().max_text_seq_length
        picture = (3, FACE_TOKENS_SIDE, FACE_TOKENS_SIDE)
        self._tokens = torch.empty(kept, length, dtype=torch.int64, device=device)
        self._clips = torch.empty(kept, len(_MOMENTS), *picture, dtype=torch.uint8, device=device)
        self._photos = torch.empty(kept, 2, *picture, dtype=torch.uint8, device=device)

    def draw(self, count: int) -> None:
        """Draw people in the place of the oldest."""
        numbers = range(self.drawn, self.drawn + count)
        seeds = [self._people[number % len(self._people)] for number in numbers]
        at = torch.tensor([number % self._kept for number in numbers], device=self._device)
        conditions = [sample_conditions([self._first_clip + 3 * n + clip for n in numbers]) for clip in range(3)]
        captions = [caption(condition, seed=condition.seed) for condition in conditions[0]]
        self._tokens[at] = self._tokenizer(
            captions, padding="max_length", max_length=self._tokens.shape[1], return_tensors="pt"
        ).input_ids.to(self._device)
        self._clips[at] = self._frames(seeds, conditions[0])
        for photo, taken in enumerate(conditions[1:]):
            drawing = draw_photos(seeds, taken, self._device)
            faces = face_image(drawing, noisy_points(drawing, self._generator), FACE_TOKENS_SIDE)
            self._photos[at, photo] = _as_bytes(faces)
        self.drawn += count

    def _frames(self, seeds: list[int], conditions: list[ClipCondition]) -> Tensor:
        identity = identity_parameters(torch.tensor(seeds, device=self._device))
        scene = scene_curves(conditions, FRAMES)[:, list(_MOMENTS)].to(self._device)
        frames = draw_people(identity, scene, SIDE).frames_BFCHW
        larger = F.interpolate(frames.flatten(0, 1), size=FACE_TOKENS_SIDE, mode="bilinear", align_corners=False)
        return _as_bytes(larger).view(*frames.shape[:3], FACE_TOKENS_SIDE, FACE_TOKENS_SIDE)

    def take(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, 226), clips (B, 3, 3, 112, 112) and photos (B, 2, 3, 112, 112), of B different people."""
        available = min(self.drawn, self._kept)
        at = torch.randperm(available, generator=self._generator, device=self._device)[:count]
        return self._tokens[at], self._clips[at].float() / 127.5 - 1, self._photos[at].float() / 127.5 - 1


def train_towers(settings: TowersSettings, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Towers:
    """Return the towers with averaged weights, bfloat16 on `device`."""
    torch.manual_seed(settings.seed)
    towers = Towers().to(device, torch.bfloat16).train().requires_grad_(True)
    told = timed_settings("towers", settings.people, settings.learning_rate, decay=0.99)
    optimizer = MasterAdamW(towers.named_parameters(), told)
    generator = torch.Generator(device).manual_seed(settings.seed)
    store = _Store(settings.kept, tokenizer, device, generator, SPLITS["train"], first_clip=0)
    pad = tokenizer.pad_token_id
    while store.drawn < 2 * settings.people:
        store.draw(settings.fresh)
    progress = Progress(name="towers", seconds=settings.seconds)
    while (share := progress.share) < 1:
        if progress.steps % _DRAW_EVERY == 0:
            store.draw(settings.fresh)
        tokens, clips, photos = store.take(settings.people)
        described = _contrast(towers.embed_text(tokens, pad), towers.embed_clips(clips))
        first, second = (F.normalize(towers.embed_pictures(photo).float(), dim=1) for photo in photos.unbind(1))
        recognised = _contrast(first, second)
        (described + recognised).backward()
        losses = torch.stack([described, recognised])
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
    store = _Store(count, tokenizer, device, generator, SPLITS["test"][30_000:], first_clip=TEST_CLIPS)
    store.draw(count)
    tokens, clips, photos = store.take(count)
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
