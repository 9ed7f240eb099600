"""The test cases as the tiny model takes them and the judges see them, and the scores of a trained transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from echovideo.evaluation.cases import Case, draw_gallery, draw_reference_photos, draw_truths
from echovideo.evaluation.networks import Judges
from echovideo.evaluation.scores import Evidence, Expected, expect, look, score
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.request import GuidanceSchedule
from echovideo.tiny.drawing import draw_photos
from echovideo.tiny.generate import decoded, generate
from echovideo.tiny.world import Encoders, Photos

_CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exam:
    """Test cases, ready for any number of transformers: encoded photos, what judges compare with, and the ceiling.

    The ceiling is what the judges see in drawn clips that show what was asked, after the autoencoder. `truths_BFHWC`
    are these clips before it.
    """

    encoders: Encoders
    judges: Judges
    photos: Photos
    expected: Expected
    truths_BFHWC: Tensor  # noqa: N815
    ceiling: Evidence

    @classmethod
    @torch.no_grad()
    def of(cls, encoders: Encoders, judges: Judges, cases: Sequence[Case], device: torch.device) -> Exam:
        """Draw and encode the cases."""
        truths, references = draw_truths(cases, str(device)), draw_reference_photos(cases, str(device))
        gallery = draw_gallery(list(dict.fromkeys(case.person for case in cases)), str(device))
        expected = expect(judges, cases, truths_BFHWC=truths, references_BFHWC=references, gallery_BFHWC=gallery)
        return cls(
            encoders=encoders,
            judges=judges,
            photos=case_photos(encoders, cases, torch.Generator(device).manual_seed(0)),
            expected=expected,
            truths_BFHWC=truths,
            ceiling=look(judges, _through_autoencoder(encoders, truths, device), expected),
        )

    def clips(
        self,
        transformer: EchoVideoTransformer3DModel,
        *,
        face_latent: float,
        guidance: float = 3.0,
        guidance_schedule: GuidanceSchedule = "constant",
        identity: bool = True,
    ) -> Tensor:
        """Return the transformer's clip of each case, uint8 (B, 17, 96, 96, 3), of the same noise at every call."""
        return generate(
            transformer,
            self.encoders,
            [case.prompt for case in self.expected.cases],
            self.photos,
            generator=torch.Generator(self.photos.mean_BCHW.device).manual_seed(0),
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            face_latent=face_latent,
            identity=identity,
        )

    def see(self, clips_BFHWC: Tensor) -> Evidence:
        """Return what the judges see in clips of the cases."""
        return look(self.judges, clips_BFHWC, self.expected)


def case_photos(encoders: Encoders, cases: Sequence[Case], generator: torch.Generator) -> Photos:
    """Return the cases' reference photos, encoded."""
    parts = []
    for start in range(0, len(cases), _CHUNK):
        chunk = cases[start : start + _CHUNK]
        drawing = draw_photos([case.person for case in chunk], [case.reference for case in chunk], generator.device)
        parts.append(encoders.photos(drawing, generator))
    return Photos(
        tokens_BND=torch.cat([part.tokens_BND for part in parts]),
        embedding_BD=torch.cat([part.embedding_BD for part in parts]),
        mean_BCHW=torch.cat([part.mean_BCHW for part in parts]),
        std_BCHW=torch.cat([part.std_BCHW for part in parts]),
    )


def measure_model(
    transformer: EchoVideoTransformer3DModel, exam: Exam, out: Path
) -> Mapping[str, tuple[float, str, float | None]]:
    """Return scores on the exam's people, under several guidances, and write the first clips to samples.png."""
    found: dict[str, tuple[float, str, float | None]] = {}
    sheet = [exam.expected.references_BHWC[:8, None], exam.truths_BFHWC[:8, ::8]]
    settings: tuple[tuple[GuidanceSchedule, float, float], ...] = (
        ("published", 6.0, 1.0),
        ("constant", 3.0, 1.0),
        ("constant", 3.0, 0.0),
    )
    for schedule, guidance, strength in settings:
        clips = exam.clips(transformer, face_latent=strength, guidance=guidance, guidance_schedule=schedule)
        sheet.append(clips[:8, ::8])
        for name, measured in score(exam.see(clips), exam.ceiling).items():
            found[f"{schedule} {guidance:g}, face latent {strength:g}: {name}"] = (measured.value, "", None)
            if measured.ceiling is not None:
                found[f"ceiling: {name}"] = (measured.ceiling, "", None)
    picture = torch.cat(sheet, dim=1).permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    Image.fromarray(picture.numpy()).save(out / "samples.png")
    return found


def _through_autoencoder(encoders: Encoders, clips_BFHWC: Tensor, device: torch.device) -> Tensor:
    parts = []
    for chunk in clips_BFHWC.split(_CHUNK):
        video = chunk.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        mean = encoders.vae.encode(video.bfloat16()).latent_dist.mean  # type: ignore[operator]
        parts.append(decoded(encoders, mean.transpose(1, 2) * encoders.scaling_factor))
    return torch.cat(parts)
