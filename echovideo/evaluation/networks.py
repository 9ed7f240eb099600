"""The judges of the drawn world: two networks that read from a clip what happens in it and who is in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

from echovideo.synthetic.clip import ATTRIBUTES, CURVES
from echovideo.synthetic.person import PARAMETERS

WEIGHTS = Path(__file__).parent / "weights"
FRAMES = 17
FRAME_STEP = 2
"""The judges look at every second frame: the fastest motion, a mouth's 3.2 cycles a clip, is still told from none."""
SEEN_FRAMES = len(range(0, FRAMES, FRAME_STEP))

NUISANCES = ("yaw", "pitch", "light_x", "smile", "mouth_open")
"""What a clip has more or less of, as means over its frames, in the units of the scene's curves."""
TRAITS: tuple[str, ...] = tuple(name for name in PARAMETERS if not name.startswith("mole"))
"""The identity parameters that the identity judge estimates. Moles have no order: they are read as a map."""
EMBEDDING = 128

CROP_SIDE = 96
# The aligned crop: how many of a person's lengths it spans, and where in it the point between the eyes lies.
_SPAN, _EYES_ACROSS, _EYES_DOWN = 1.95, 0.5, 0.354
# The five points of the mean face, straight ahead, in a person's lengths.
_FACE_POINTS = ((-0.325, 0.0), (0.325, 0.0), (0.0, 0.38), (-0.27, 0.735), (0.27, 0.735))
# The mole map is the part of a 12 x 12 grid over the crop where moles are.
_GRID = 12
_MOLE_ROWS, _MOLE_COLUMNS = range(1, 10), range(2, 10)
MOLE_ROWS, MOLE_COLUMNS = len(_MOLE_ROWS), len(_MOLE_COLUMNS)
# Where the points are in a picture, as shares of its side, on average, and the scale that they are estimated in.
_USUAL_POINTS = ((0.40, 0.44), (0.60, 0.44), (0.5, 0.56), (0.42, 0.65), (0.58, 0.65))
_POINT_SCALE = 0.1

_MOLES = tuple(tuple(PARAMETERS.index(f"mole_{number}_{what}") for what in ("x", "y", "size")) for number in range(3))
_TRAIT_COLUMNS = tuple(PARAMETERS.index(name) for name in TRAITS)
_LOG_VARIANCE = (-5.0, 2.0)
_RARE = 4.0
_CHUNK = 32


def nuisances(scene_BFS: Tensor) -> Tensor:
    """Return the true NUISANCES (B, len(NUISANCES)) of a scene tensor (B, F, len(CURVES))."""
    return scene_BFS[:, :, [CURVES.index(name) for name in NUISANCES]].mean(dim=1)


def traits(identity_BP: Tensor) -> Tensor:
    """Return the columns of TRAITS of an identity tensor (B, len(PARAMETERS))."""
    return identity_BP[:, list(_TRAIT_COLUMNS)]


def mole_map(identity_BP: Tensor) -> Tensor:
    """Return where each person has a mole: 1 or 0 for each cell of a grid over the face, (B, rows * columns)."""
    cells = torch.zeros(len(identity_BP), _GRID, _GRID, device=identity_BP.device)
    people = torch.arange(len(identity_BP), device=identity_BP.device)
    for x, y, size in _MOLES:
        row = ((_EYES_DOWN + identity_BP[:, y] / _SPAN) * _GRID).long()
        column = ((_EYES_ACROSS + identity_BP[:, x] / _SPAN) * _GRID).long()
        cells[people, row, column] = torch.maximum(cells[people, row, column], (identity_BP[:, size] > 0).float())
    return _face_cells(cells)


def face_crops(pictures_NCHW: Tensor, points_N52: Tensor) -> Tensor:
    """Return the faces (N, C, CROP_SIDE, CROP_SIDE), turned upright and of one size, by the five points.

    Points are shares of the picture's side. The similarity is the least-squares one from the mean face's points.
    """
    template = _in_crop(torch.tensor(_FACE_POINTS, device=points_N52.device))
    middle = template.mean(dim=0)
    from_x, from_y = (template - middle).unbind(dim=1)
    to = points_N52 - points_N52.mean(dim=1, keepdim=True)
    size = (from_x**2 + from_y**2).sum()
    cosine = ((from_x * to[..., 0] + from_y * to[..., 1]).sum(dim=1) / size)[:, None, None]
    sine = ((from_x * to[..., 1] - from_y * to[..., 0]).sum(dim=1) / size)[:, None, None]
    steps = (torch.arange(CROP_SIDE, device=points_N52.device) + 0.5) / CROP_SIDE
    across, down = steps[None, None, :] - middle[0], steps[None, :, None] - middle[1]
    centre = points_N52.mean(dim=1)[:, None, None]
    grid = torch.stack((cosine * across - sine * down, sine * across + cosine * down), dim=3) + centre
    return functional.grid_sample(
        pictures_NCHW, grid * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False
    )


class AttributeJudge(nn.Module):
    """Reads a clip's attributes and nuisances: a small (2+1)D network, spatial and temporal convolutions in turn."""

    nuisance_mean: Tensor
    nuisance_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 80, 112)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, stride=2, padding=3), _SpaceTimeBlock(widths[0])]
        for before, width in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _SpaceTimeBlock(width), _SpaceTimeBlock(width)]
        self.trunk = nn.Sequential(*layers)
        self.frame = _Summary(widths[-1], 96)
        # Glasses and expressions are small: they are read from the face crops.
        face_widths = (24, 48, 80)
        layers = [nn.Conv2d(3, face_widths[0], 5, stride=2, padding=2), _SpaceTimeBlock(face_widths[0])]
        for before, width in itertools.pairwise(face_widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _SpaceTimeBlock(width)]
        self.face_trunk = nn.Sequential(*layers)
        self.face = _Summary(face_widths[-1], 64)
        self.clip = nn.Sequential(nn.Linear(SEEN_FRAMES * (96 + 64), 224), nn.GELU())
        self.attributes = nn.Linear(224, sum(len(values) for values in ATTRIBUTES.values()))
        self.nuisances = nn.Linear(224, len(NUISANCES))
        self.register_buffer("nuisance_mean", torch.zeros(len(NUISANCES)))
        self.register_buffer("nuisance_scale", torch.ones(len(NUISANCES)))

    def forward(self, frames_BFCHW: Tensor, faces_BFCHW: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return each attribute's logits (B, values) and the standardised nuisances (B, len(NUISANCES)).

        `frames_BFCHW` are the SEEN_FRAMES frames of a clip, 0 to 1, `faces_BFCHW` the `face_crops` of each.
        """
        clips = len(frames_BFCHW)
        whole = self.frame(self.trunk(_centred(frames_BFCHW.flatten(0, 1))))
        face = self.face(self.face_trunk(_centred(faces_BFCHW.flatten(0, 1))))
        features = self.clip(torch.cat((whole, face), dim=1).reshape(clips, -1))
        logits = self.attributes(features).float().split([len(values) for values in ATTRIBUTES.values()], dim=1)
        return dict(zip(ATTRIBUTES, logits, strict=True)), self.nuisances(features).float()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Face:
    """What the identity judge makes of N pictures: standardised traits (N, len(TRAITS)) and the logarithm of their
    variances, an embedding of unit length (N, EMBEDDING) and logits of the mole map (N, cells)."""

    traits: Tensor
    log_variance: Tensor
    embedding: Tensor
    moles: Tensor


class IdentityJudge(nn.Module):
    """Reads who is in a face crop: a pre-activated convolutional network with channel gates.

    Finds the five points that the crop is made by, too: `locate`, a network of its own.

    `visible` says which traits it was measured to see, a number 0 or 1 for each of TRAITS.
    """

    trait_mean: Tensor
    trait_scale: Tensor
    visible: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.locator = _Locator()
        self.early = nn.Sequential(
            nn.Conv2d(3, 40, 5, stride=2, padding=2),
            _GatedBlock(40),
            nn.Conv2d(40, 80, 3, stride=2, padding=1),
            _GatedBlock(80),
        )
        self.late = nn.Sequential(
            _GatedBlock(80),
            nn.Conv2d(80, 96, 3, stride=2, padding=1),
            _GatedBlock(96),
            _GatedBlock(96),
            nn.Conv2d(96, 104, 3, stride=2, padding=1),
            _GatedBlock(104),
            _GatedBlock(104),
        )
        self.summary = _Summary(104, 192)
        # Freckles are a texture of single pixels: how much of it there is, is read before it is averaged away.
        self.texture = nn.Sequential(nn.Conv2d(80, 64, 1), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.merge = nn.Sequential(nn.Linear(192 + 64 * 9, 192), nn.GELU())
        self.traits = nn.Linear(192, len(TRAITS))
        self.log_variance = nn.Linear(192, len(TRAITS))
        self.embedding = nn.Linear(192, EMBEDDING)
        # A mole is a dot: it is found where it is, by a map of local features.
        self.moles = nn.Sequential(
            nn.GELU(), nn.Conv2d(80, 48, 3, padding=1), nn.GELU(), nn.AdaptiveMaxPool2d(_GRID), nn.Conv2d(48, 1, 1)
        )
        self.register_buffer("trait_mean", torch.zeros(len(TRAITS)))
        self.register_buffer("trait_scale", torch.ones(len(TRAITS)))
        self.register_buffer("visible", torch.ones(len(TRAITS)))

    def locate(self, pictures_NCHW: Tensor) -> Tensor:
        """Return the five points (N, 5, 2) of the face in pictures, 0 to 1, as shares of their side."""
        offsets: Tensor = self.locator(_centred(pictures_NCHW)).float().unflatten(1, (5, 2))
        return torch.tensor(_USUAL_POINTS, device=offsets.device) + _POINT_SCALE * offsets

    def forward(self, faces_NCHW: Tensor) -> Face:
        """Return what face crops, 0 to 1, show of a person."""
        early = self.early(_centred(faces_NCHW))
        features = self.merge(torch.cat((self.summary(self.late(early)), self.texture(early)), dim=1))
        # Few cells have a mole: the training starts near their share instead of unlearning a half.
        moles = self.moles(early).float()[:, 0] - _RARE
        return Face(
            traits=self.traits(features).float(),
            # A guess of the errors only: learning it must not shake the features that the traits are read from.
            log_variance=self.log_variance(features.detach()).float().clamp(*_LOG_VARIANCE),
            embedding=functional.normalize(self.embedding(features).float(), dim=1),
            moles=_face_cells(moles),
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipReading:
    """What the judges read in N clips, on the CPU.

    `attributes`: for each of ATTRIBUTES the index (N,) of the value read. `nuisances` (N, len(NUISANCES)) in the units
    of the scene's curves, `traits` (N, len(TRAITS)) in those of the identity parameters, both float32. `embeddings`
    (N, EMBEDDING) of unit length. `moles` (N, cells): how likely each cell of the mole map has a mole.
    """

    attributes: Mapping[str, Tensor]
    nuisances: Tensor
    traits: Tensor
    embeddings: Tensor
    moles: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judges:
    """Both judges, ready to read clips."""

    attribute: AttributeJudge
    identity: IdentityJudge

    @torch.inference_mode()
    def read(self, frames_BFHWC: Tensor) -> ClipReading:
        """Return what the judges read in clips: uint8 (B, FRAMES, 96, 96, 3); one frame is a clip that stands still."""
        assert frames_BFHWC.dtype == torch.uint8
        if frames_BFHWC.shape[1] == 1:
            frames_BFHWC = frames_BFHWC.expand(-1, FRAMES, -1, -1, -1)
        assert frames_BFHWC.shape[1] == FRAMES, f"a clip has {FRAMES} frames, not {frames_BFHWC.shape[1]}"
        device = self.identity.trait_mean.device
        readings = [
            self._read(chunk.to(device).permute(0, 1, 4, 2, 3).float() / 255)
            for chunk in frames_BFHWC[:, ::FRAME_STEP].split(_CHUNK)
        ]
        return ClipReading(
            attributes={name: torch.cat([reading.attributes[name] for reading in readings]) for name in ATTRIBUTES},
            nuisances=torch.cat([reading.nuisances for reading in readings]),
            traits=torch.cat([reading.traits for reading in readings]),
            embeddings=torch.cat([reading.embeddings for reading in readings]),
            moles=torch.cat([reading.moles for reading in readings]),
        )

    def _read(self, frames_BFCHW: Tensor) -> ClipReading:
        attribute, identity = self.attribute, self.identity
        clips = len(frames_BFCHW)
        with torch.autocast(frames_BFCHW.device.type, torch.bfloat16, enabled=frames_BFCHW.is_cuda):
            pictures = frames_BFCHW.flatten(0, 1)
            faces = face_crops(pictures, identity.locate(pictures))
            logits, standard_nuisances = attribute(frames_BFCHW, faces.unflatten(0, (clips, -1)))
            face = identity(faces)
        # Frames that show a trait well count for more.
        weight = torch.exp(-face.log_variance).unflatten(0, (clips, -1))
        standard_traits = (face.traits.unflatten(0, (clips, -1)) * weight).sum(dim=1) / weight.sum(dim=1)
        return ClipReading(
            attributes={name: values.argmax(dim=1).cpu() for name, values in logits.items()},
            nuisances=(standard_nuisances * attribute.nuisance_scale + attribute.nuisance_mean).cpu(),
            traits=(standard_traits * identity.trait_scale + identity.trait_mean).cpu(),
            embeddings=functional.normalize(face.embedding.unflatten(0, (clips, -1)).mean(dim=1), dim=1).cpu(),
            moles=face.moles.unflatten(0, (clips, -1)).mean(dim=1).sigmoid().cpu(),
        )


def save_judges(judges: Judges, folder: Path) -> None:
    """Write both judges into a folder, as half-precision safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in _named(judges).items():
        save_model(network.half(), str(folder / f"{name}.safetensors"))
        network.float()


def load_judges(folder: Path = WEIGHTS, device: torch.device | str = "cpu") -> Judges:
    """Return the judges of a folder. Raises FileNotFoundError where they were not trained yet."""
    judges = Judges(attribute=AttributeJudge(), identity=IdentityJudge())
    for name, network in _named(judges).items():
        load_model(network, str(folder / f"{name}.safetensors"))
        network.to(device).eval().requires_grad_(False)
    return judges


def _named(judges: Judges) -> dict[str, nn.Module]:
    return {"attribute_judge": judges.attribute, "identity_judge": judges.identity}


def _centred(pictures_NCHW: Tensor) -> Tensor:
    return (pictures_NCHW - 0.5) * 4


def _in_crop(points: Tensor) -> Tensor:
    """Return points in a person's lengths as shares of the crop's side."""
    return points / _SPAN + torch.tensor((_EYES_ACROSS, _EYES_DOWN), device=points.device)


def _face_cells(grid_NHW: Tensor) -> Tensor:
    """Return the cells of a grid over the crop that the mole map has, (N, rows * columns)."""
    rows, columns = _MOLE_ROWS, _MOLE_COLUMNS
    return grid_NHW[:, rows.start : rows.stop, columns.start : columns.stop].flatten(1)


class _Locator(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(48), nn.Conv2d(3, 24, 5, padding=2)]
        for before, width in itertools.pairwise((24, 48, 64, 96, 96)):
            layers += [
                nn.GroupNorm(8, before),
                nn.GELU(),
                nn.Conv2d(before, width, 3, stride=2, padding=1),
            ]
        super().__init__(*layers, nn.GELU(), nn.Flatten(), nn.Linear(96 * 9, 96), nn.GELU(), nn.Linear(96, 10))


class _Summary(nn.Sequential):
    """A picture's features as a vector that still knows where each was seen."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, 48, 1),
            nn.AdaptiveAvgPool2d(6),
            nn.Flatten(),
            nn.Linear(48 * 36, width),
            nn.LayerNorm(width),
            nn.GELU(),
        )


class _SpaceTimeBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.space_norm, self.time_norm = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.space = nn.Conv2d(channels, channels, 3, padding=1)
        # A convolution over three frames, as a linear map of each with its neighbours.
        self.time = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.time_norm(self.space(functional.gelu(self.space_norm(x)))))
        clips = hidden.unflatten(0, (-1, SEEN_FRAMES))
        before = torch.cat((clips[:, :1], clips[:, :-1]), dim=1)
        after = torch.cat((clips[:, 1:], clips[:, -1:]), dim=1)
        mixed: Tensor = self.time(torch.cat((before, clips, after), dim=2).flatten(0, 1))
        return x + mixed


class _GatedBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.GELU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        gated: Tensor = x + hidden * self.gate(hidden)
        return gated
