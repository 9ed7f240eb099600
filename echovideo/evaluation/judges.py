"""Trains the judges on drawn people and measures them: `python -m echovideo.evaluation.judges --out FOLDER`.

Both learn from one stream of clips of the judge split's people, blurred, discoloured and made noisy as a video model
would. Writes attribute_judge.safetensors, identity_judge.safetensors and judges.json, and exits with 1 where a floor is
missed. On a GPU it takes --minutes and the time to compile the drawing; needs torch, numpy and safetensors.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from echovideo.evaluation.networks import (
    FRAME_STEP,
    FRAMES,
    NUISANCES,
    SEEN_FRAMES,
    TRAITS,
    AttributeJudge,
    Face,
    IdentityJudge,
    Judges,
    face_crops,
    load_judges,
    mole_map,
    nuisances,
    save_judges,
    traits,
)
from echovideo.evaluation.statistics import Numbers, determination, once, ranking_share
from echovideo.results import Row, machine_name, reaches, write_results
from echovideo.synthetic.clip import ATTRIBUTES, ClipCondition, sample_conditions, scene_curves
from echovideo.synthetic.draw import SIDE, draw_tensors
from echovideo.synthetic.person import SPLITS, identity_parameters

MACRO_FLOOR, RANK_FLOOR = 0.95, 0.95
PEOPLE = 300
CLIPS_EACH = 2
# Far from the test people that generators are scored on, and from those that were looked at.
_TEST = SPLITS["test"][50_000 : 50_000 + PEOPLE]
_VALIDATION = SPLITS["validation"][50_000 : 50_000 + PEOPLE]
_FIRST_CLIP = 2_000_000_000
"""The first clip seed of the judges' own; generators are trained on those from 0."""
VISIBLE_R2 = 0.3
_RATE, _WEIGHT_DECAY, _CLIP_NORM, _WARM_UP = 1e-3, 0.02, 1.0, 0.04
_EMA_DECAY = 0.998
_TEMPERATURE = 0.08
_POINT_ERROR = 0.05
_SMOOTHING = 0.02
_REPORT_EVERY = 50
_CHUNK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much is drawn and read in training.

    Each step draws CLIPS_EACH clips of `people_drawn` new people into a store of the last `people_kept`, and takes from
    it the clips of `people_read` for the attribute judge and two frames of each of `people_compared` for the identity
    judge.
    """

    seconds: float
    people_drawn: int = 32
    people_kept: int = 4096
    people_read: int = 64
    people_compared: int = 256
    side: int = SIDE


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DrawnClips:
    """Drawn clips of N people, CLIPS_EACH each: uint8 frames (N, 2, SEEN_FRAMES, 3, H, W) and what is true of them.

    `points` (N, 2, SEEN_FRAMES, 5, 2) are the five face points as shares of the frame's side.
    """

    frames: Tensor
    points: Tensor
    attributes: Tensor
    nuisances: Tensor
    identity: Tensor

    def write(self, at: Tensor, fresh: DrawnClips) -> None:
        for field in fields(self):
            getattr(self, field.name)[at] = getattr(fresh, field.name)

    def take(self, at: Tensor) -> DrawnClips:
        return DrawnClips(**{field.name: getattr(self, field.name)[at] for field in fields(self)})

    def room_for(self, people: int) -> DrawnClips:
        """Return a store for the clips of so many people, empty."""
        return DrawnClips(
            **{
                field.name: (tensor := getattr(self, field.name)).new_zeros(people, *tensor.shape[1:])
                for field in fields(self)
            }
        )


def draw_clips(seeds: range, side: int, device: str, *, compiled: bool) -> DrawnClips:
    """Return drawn clips of the people that the seeds name."""
    conditions = sample_conditions(
        [_FIRST_CLIP + CLIPS_EACH * seed + clip for seed in seeds for clip in range(CLIPS_EACH)]
    )
    scene = scene_curves(conditions, FRAMES)
    identity = identity_parameters(torch.tensor(list(seeds), device=device))
    seen = scene[:, ::FRAME_STEP].to(device)
    drawn = draw_tensors(identity.repeat_interleave(CLIPS_EACH, dim=0), seen, side, side, compiled=compiled)
    shape = len(seeds), CLIPS_EACH
    return DrawnClips(
        frames=_as_bytes(drawn.frames_BFCHW).unflatten(0, shape),
        points=(drawn.landmarks_BF52 / side).unflatten(0, shape),
        attributes=attribute_indices(conditions).to(device).unflatten(0, shape),
        nuisances=nuisances(scene).to(device).unflatten(0, shape),
        identity=identity,
    )


def attribute_indices(conditions: list[ClipCondition]) -> Tensor:
    """Return the index of each attribute's value in ATTRIBUTES, int64 (B, len(ATTRIBUTES))."""
    return torch.tensor(
        [[ATTRIBUTES[name].index(value) for name, value in condition.attributes().items()] for condition in conditions]
    )


def degrade(clips_BFCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return clips, 0 to 1, with the faults of an autoencoder and a small video model, each clip its own amounts.

    Blur at two widths, colour at half the resolution, shifted contrast and tint, fine noise in each frame and coarse
    noise in the clip.
    """
    batch, frames, channels, height, width = clips_BFCHW.shape
    device = clips_BFCHW.device

    def amount(high: float, low: float = 0.0, channels: int = 1) -> Tensor:
        draws = torch.rand(batch, 1, channels, 1, 1, generator=generator, device=device)
        return low + (high - low) * draws

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    flat = clips_BFCHW.flatten(0, 1)
    soft = functional.avg_pool2d(functional.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    half = functional.avg_pool2d(flat, 2)
    half = functional.interpolate(half, size=(height, width), mode="bilinear", align_corners=False)
    soft, half = soft.view_as(clips_BFCHW), half.view_as(clips_BFCHW)
    clips = torch.lerp(clips_BFCHW, soft, amount(0.7) * (amount(1.0) > 0.3))
    clips = torch.lerp(clips, half, amount(0.7) * (amount(1.0) > 0.5))
    grey, half_grey = clips.mean(dim=2, keepdim=True), half.mean(dim=2, keepdim=True)
    clips = torch.lerp(clips, half - half_grey + grey, amount(1.0) * (amount(1.0) > 0.5))

    contrast, middle = amount(1.06, 0.94), clips.mean(dim=(1, 2, 3, 4), keepdim=True)
    clips = (clips - middle) * contrast + middle
    clips = clips * amount(1.025, 0.975, channels) + amount(0.02, -0.02)
    coarse = noise(batch, channels, math.ceil(height / 8), math.ceil(width / 8))
    coarse = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    clips = clips + amount(0.02) * coarse[:, None] + amount(0.03) * noise(batch, frames, channels, height, width)
    return clips.clamp(0, 1)


def shaken(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return face points (..., 5, 2) as far off as a locator's, _POINT_ERROR of the eye distance."""
    eyes = (points[..., 1, :] - points[..., 0, :]).norm(dim=-1)[..., None, None]
    noise = torch.randn(points.shape, generator=generator, device=points.device)
    moved: Tensor = points + _POINT_ERROR * eyes * noise
    return moved


def attribute_loss(
    judge: AttributeJudge, frames_BFCHW: Tensor, points_BF52: Tensor, attributes: Tensor, nuisance: Tensor
) -> Tensor:
    """Return the mean cross-entropy over attributes plus the nuisances' error, standardised; points cut the faces."""
    faces = face_crops(frames_BFCHW.flatten(0, 1), points_BF52.flatten(0, 1)).unflatten(0, frames_BFCHW.shape[:2])
    logits, estimate = judge(frames_BFCHW, faces)
    losses = [
        functional.cross_entropy(values, truth, label_smoothing=_SMOOTHING)
        for values, truth in zip(logits.values(), attributes.unbind(1), strict=True)
    ]
    standard = (nuisance - judge.nuisance_mean) / judge.nuisance_scale
    return torch.stack(losses).mean() + functional.smooth_l1_loss(estimate, standard)


def point_loss(judge: IdentityJudge, pictures_NCHW: Tensor, points_N52: Tensor) -> Tensor:
    """Return how far off the located points are, in hundredths of the picture's side."""
    return functional.smooth_l1_loss(100 * judge.locate(pictures_NCHW), 100 * points_N52)


def identity_loss(judge: IdentityJudge, pictures_NTCHW: Tensor, points_NT52: Tensor, identity_NP: Tensor) -> Tensor:
    """Return what is wrong with the readings of two pictures of each of N people, faces cut by points.

    Squared error of the standardised traits; how well the variances predict it; telling each person's other picture
    from the others' (arXiv:1807.03748, both ways); the mole map.
    """
    face: Face = judge(face_crops(pictures_NTCHW.flatten(0, 1), points_NT52.flatten(0, 1)))
    people_twice = identity_NP.repeat_interleave(2, dim=0)
    error = (face.traits - (traits(people_twice) - judge.trait_mean) / judge.trait_scale).square()
    # The variances learn from the errors and not the other way round, so that hard traits keep their full weight.
    likelihood = 0.5 * (error.detach() * torch.exp(-face.log_variance) + face.log_variance)
    first, second = face.embedding.unflatten(0, (-1, 2)).unbind(1)
    likeness = first @ second.T / _TEMPERATURE
    same = torch.arange(len(first), device=first.device)
    contrast = functional.cross_entropy(likeness, same) + functional.cross_entropy(likeness.T, same)
    moles = functional.binary_cross_entropy_with_logits(face.moles, mole_map(people_twice), reduction="none")
    return error.mean() + likelihood.mean() + 0.5 * contrast + 0.25 * moles.sum(dim=1).mean()


def train_judges(budget: Budget, device: str) -> tuple[Judges, int]:
    """Return trained judges, the mean of their weights over the last steps, and how many steps they took."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    compiled = device == "cuda"
    judges = Judges(attribute=AttributeJudge().to(device), identity=IdentityJudge().to(device))
    _set_scales(judges, device)
    averaged = copy.deepcopy(judges)
    weights = _weights(judges)
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.99), weight_decay=_WEIGHT_DECAY, fused=compiled)

    split, drawn = SPLITS["judge"], 0

    def next_clips() -> DrawnClips:
        nonlocal drawn
        seeds = split[drawn % len(split) :][: budget.people_drawn]
        drawn += budget.people_drawn
        return draw_clips(seeds, budget.side, device, compiled=compiled)

    first = next_clips()
    kept = first.room_for(budget.people_kept)
    slots = torch.arange(budget.people_drawn, device=device)
    filled = step = 0
    start = time.perf_counter()
    while (share := (time.perf_counter() - start) / budget.seconds) < 1:
        # The first steps would see few people many times: the store is filled a little first.
        for _ in range(1 if step else min(8, budget.people_kept // budget.people_drawn)):
            kept.write((slots + filled) % budget.people_kept, next_clips())
            filled += budget.people_drawn
        available = min(filled, budget.people_kept)

        read = kept.take(torch.randint(available, (budget.people_read,), generator=generator, device=device))
        shown = degrade(read.frames.flatten(0, 1).float() / 255, generator)
        # Nobody twice: two pictures of one person must not count as two people.
        chosen = torch.randperm(available, generator=generator, device=device)[: budget.people_compared]
        compared = kept.identity[chosen]
        moments = torch.randint(SEEN_FRAMES, (len(chosen), CLIPS_EACH), generator=generator, device=device)
        frame = chosen[:, None], torch.arange(CLIPS_EACH, device=device)[None], moments
        pictures, points = kept.frames[frame], kept.points[frame]
        pictures = degrade(pictures.flatten(0, 1)[:, None].float() / 255, generator)[:, 0].unflatten(0, (-1, 2))

        with torch.autocast(device, torch.bfloat16, enabled=compiled):
            attribute = attribute_loss(
                judges.attribute,
                shown,
                shaken(read.points.flatten(0, 1), generator),
                read.attributes.flatten(0, 1),
                read.nuisances.flatten(0, 1),
            )
            identity = identity_loss(judges.identity, pictures, shaken(points, generator), compared)
            located = point_loss(judges.identity, pictures.flatten(0, 1), points.flatten(0, 1))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(share / _WARM_UP, 1) * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.zero_grad(set_to_none=True)
        (attribute + identity + located).backward()
        # Apart, for they share nothing: a bad step of one must not hold the others back.
        locator = list(judges.identity.locator.parameters())
        reader = [weight for name, weight in judges.identity.named_parameters() if not name.startswith("locator")]
        for part in (list(judges.attribute.parameters()), locator, reader):
            nn.utils.clip_grad_norm_(part, _CLIP_NORM)
        optimizer.step()
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(_weights(averaged), weights, None)
        if step % _REPORT_EVERY == 0:
            losses = attribute.item(), identity.item(), located.item()
            if not all(map(math.isfinite, losses)):
                raise RuntimeError(f"step {step}: losses are {losses}; the judges cannot be used")
            shown_losses = "attributes {:.3f}, identity {:.3f}, points {:.3f}".format(*losses)
            print(f"step {step} at {share:.0%}: {shown_losses}", flush=True)
        step += 1
    for network in (averaged.attribute, averaged.identity):
        network.eval().requires_grad_(False)
    return averaged, step


def measure(judges: Judges, seeds: range, side: int, device: str) -> list[Row]:
    """Return how right the judges are on one clip each of unseen people, as drawn and degraded.

    The gallery for finding the people again is one neutral picture each.
    """
    conditions = sample_conditions([_FIRST_CLIP + CLIPS_EACH * seed for seed in seeds])
    scene = scene_curves(conditions, FRAMES)
    identity = identity_parameters(torch.tensor(list(seeds)))
    clips = _clips(identity, scene, side, device)
    neutral = scene_curves([ClipCondition(seed=0)] * len(seeds), 1, reference=True)
    gallery = _clips(identity, neutral, side, device)
    spoilt = torch.cat(
        [
            _as_bytes(degrade(chunk.to(device).float() / 255, torch.Generator(device).manual_seed(1))).cpu()
            for chunk in clips.split(_CHUNK)
        ]
    )
    truth = attribute_indices(conditions)
    gallery_embeddings = judges.read(gallery.movedim(2, -1)).embeddings
    rows: list[Row] = []
    for name, frames in (("as drawn", clips), ("degraded", spoilt)):
        reading = judges.read(frames.movedim(2, -1))
        right = [(reading.attributes[key] == truth[:, i]).float().mean().item() for i, key in enumerate(ATTRIBUTES)]
        found = (reading.embeddings @ gallery_embeddings.T).argmax(dim=1) == torch.arange(len(seeds))
        moles = ranking_share(reading.moles.double().numpy(), mole_map(identity).numpy() > 0)
        floored = name == "as drawn"
        rows += [
            Row(
                name=name,
                metric="attributes right, macro",
                value=sum(right) / len(right),
                unit="share",
                floor=MACRO_FLOOR if floored else None,
            ),
            Row(
                name=name,
                metric=f"rank-1 of {len(seeds)}",
                value=found.float().mean().item(),
                unit="share",
                floor=RANK_FLOOR if floored else None,
            ),
            Row(name=name, metric="moles", value=moles, unit="AUC"),
        ]
        rows += [
            Row(
                name=f"{name}: {key}",
                metric="right",
                value=share,
                unit="share",
                against={"chance": 1 / len(ATTRIBUTES[key])},
            )
            for key, share in zip(ATTRIBUTES, right, strict=True)
        ]
        nuisance_r2 = _r2(reading.nuisances, nuisances(scene))
        trait_r2 = _r2(reading.traits, traits(identity))
        rows += [
            Row(name=f"{name}: {key}", metric="nuisance", value=value, unit="R2")
            for key, value in zip(NUISANCES, nuisance_r2.tolist(), strict=True)
        ]
        rows += [
            Row(
                name=f"{name}: {key}",
                metric="visible trait" if seen else "trait",
                value=value,
                unit="R2",
            )
            for key, value, seen in zip(TRAITS, trait_r2.tolist(), judges.identity.visible.tolist(), strict=True)
        ]
        visible = judges.identity.visible.cpu().numpy() > 0
        rows.append(Row(name=name, metric="visible traits, mean", value=float(trait_r2[visible].mean()), unit="R2"))
    return rows


def mark_visible(judges: Judges, seeds: range, side: int, device: str) -> None:
    """Set which traits the identity judge sees: those whose R2 over clips of these people is VISIBLE_R2 or more."""
    conditions = sample_conditions([_FIRST_CLIP + CLIPS_EACH * seed for seed in seeds])
    identity = identity_parameters(torch.tensor(list(seeds)))
    reading = judges.read(_clips(identity, scene_curves(conditions, FRAMES), side, device).movedim(2, -1))
    r2 = _r2(reading.traits, traits(identity))
    judges.identity.visible.copy_(torch.from_numpy(r2 >= VISIBLE_R2))


def _clips(identity_BP: Tensor, scene_BFS: Tensor, side: int, device: str) -> Tensor:
    """Return drawn clips as uint8 (B, F, 3, H, W) on the CPU."""
    parts = [
        _as_bytes(draw_tensors(identity.to(device), scene.to(device), side, side).frames_BFCHW).cpu()
        for identity, scene in zip(identity_BP.split(_CHUNK), scene_BFS.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts)


def _r2(estimate: Tensor, truth: Tensor) -> Numbers:
    r2: Numbers = determination(estimate.double().numpy(), truth.double().numpy(), once(len(truth)))[0]
    return r2


def _as_bytes(frames: Tensor) -> Tensor:
    return (frames * 255).round().byte()


def _weights(judges: Judges) -> list[Tensor]:
    return [*judges.attribute.parameters(), *judges.identity.parameters()]


def _set_scales(judges: Judges, device: str) -> None:
    """Fix what the judges' outputs are standardised by, from people and clips of the judge split."""
    sample = traits(identity_parameters(torch.tensor(SPLITS["judge"][:20_000])))
    shown = nuisances(scene_curves(sample_conditions(range(_FIRST_CLIP, _FIRST_CLIP + 2_000)), FRAMES))
    attribute, identity = judges.attribute, judges.identity
    identity.trait_mean.copy_(sample.mean(dim=0))
    identity.trait_scale.copy_(sample.std(dim=0))
    attribute.nuisance_mean.copy_(shown.mean(dim=0))
    attribute.nuisance_scale.copy_(shown.std(dim=0))


def main() -> None:
    """Train, save, measure what was saved, print and write; exit with 1 if a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the measurements")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of both judges together")
    parser.add_argument("--commit", help="what is measured, where this is no git checkout")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    judges, steps = train_judges(Budget(seconds=60 * options.minutes), device)
    mark_visible(judges, _VALIDATION, SIDE, device)
    save_judges(judges, options.out)
    rows = measure(load_judges(options.out, device), _TEST, SIDE, device)
    rows.append(Row(name="training", metric="steps", value=steps, unit="steps"))
    write_results("judges", rows, options.out, machine=machine_name(device), commit=options.commit)
    if not reaches(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
