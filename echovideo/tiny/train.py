"""Trains the tiny model's parts, each from a seed: `python -m echovideo.tiny.train PART --out FOLDER`.

Parts in their order: tokenizer, autoencoder, towers, model; the decoder, of the shipped autoencoder, at any time after
it. Each leaves its weights in FOLDER in bfloat16, named as the part, and what was measured of it as PART.json. Move
them to echovideo/tiny/weights to make them the shipped ones; later parts take the earlier ones from there. All but the
tokenizer want a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from echovideo.evaluation.cases import drawn_cases
from echovideo.evaluation.networks import load_judges
from echovideo.faces.recogniser import load_recogniser
from echovideo.results import Row, machine_name, write_results
from echovideo.synthetic.person import SPLITS
from echovideo.tiny import shipped
from echovideo.tiny.autoencoder import (
    AutoencoderMeasures,
    AutoencoderSettings,
    drawn_videos,
    measure_autoencoder,
    train_autoencoder,
    whiten,
)
from echovideo.tiny.diffusion import ModelSettings, train_model
from echovideo.tiny.parts import train_tokenizer
from echovideo.tiny.scoring import Exam, measure_model
from echovideo.tiny.towers import TowersSettings, measure_towers, train_towers
from echovideo.tiny.world import Encoders

_WHITENED_CLIPS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every part is told: where to write, how long to train, on what, and dlib's weights if not its package's."""

    out: Path
    seconds: float
    device: torch.device
    recogniser: Path | None


Measures = Mapping[str, tuple[float, str, float | None]]
"""What is measured: its value, unit and, where there is one, its floor."""


def tokenizer(options: Options) -> Measures:
    """Train the tokenizer on captions; the same on every machine."""
    trained = train_tokenizer()
    shipped.save_tokenizer(trained, options.out)
    return {"vocabulary": (float(len(trained)), "tokens", None)}


def autoencoder(options: Options) -> Measures:
    """Train the video autoencoder, going on from the shipped one if there is one, and whiten its latents.

    In no minutes at all the shipped one is whitened and not trained.
    """
    start = shipped.load_vae() if shipped.has("autoencoder") else None
    settings = AutoencoderSettings(seconds=options.seconds)
    if start:
        settings = replace(settings, phases=settings.phases[1:], learning_rate=settings.learning_rate / 2)
    vae = train_autoencoder(settings, options.device, start) if options.seconds or not start else start
    vae.to(options.device, torch.float32)
    whiten(vae, drawn_videos(SPLITS["train"][:_WHITENED_CLIPS], range(_WHITENED_CLIPS), options.device))
    found = measure_autoencoder(vae.bfloat16(), options.device)
    shipped.save_vae(vae, scaling_factor=1 / found.latents_deviation, folder=options.out)
    return _told(found)


def decoder(options: Options) -> Measures:
    """Train the shipped autoencoder's decoder alone: the transformer goes on knowing its latents."""
    start = shipped.load_vae()
    settings = AutoencoderSettings(seconds=options.seconds)
    settings = replace(settings, phases=settings.phases[1:], learning_rate=settings.learning_rate / 2)
    vae = train_autoencoder(settings, options.device, start, decoder_alone=True)
    shipped.save_vae(vae, scaling_factor=start.config.scaling_factor, folder=options.out)
    return _told(measure_autoencoder(vae, options.device))


def _told(found: AutoencoderMeasures) -> Measures:
    return {
        "clips": (found.clips_psnr, "dB PSNR", 30.0),
        "faces": (found.faces_psnr, "dB PSNR", None),
        "freckles and moles left": (found.marks_left, "share", None),
        "latents' deviation": (found.latents_deviation, "", None),
    }


def towers(options: Options) -> Measures:
    """Train the text encoder and the vision tower."""
    words = shipped.load_tokenizer()
    trained = train_towers(TowersSettings(seconds=options.seconds), words, options.device)
    shipped.save("text_encoder", trained.text_encoder, options.out)
    shipped.save("image_encoder", trained.image_encoder, options.out)
    found = measure_towers(trained, words, options.device)
    return {name: (value, "share", None) for name, value in found.items()}


def model(options: Options) -> Measures:
    """Encode the world, train base, stage 1 and stage 2 on it, and score what the model makes of unseen people.

    Goes on from the shipped transformer if there is one: the base is then left out.
    """
    judges = load_judges(device=options.device)
    encoders = Encoders.shipped(load_recogniser(options.recogniser), options.device)
    start = shipped.load_transformer() if shipped.has("transformer") else None
    transformer = train_model(ModelSettings(seconds=options.seconds), encoders, options.device, start)
    shipped.save("transformer", transformer, options.out)
    exam = Exam.of(encoders, judges, drawn_cases(), options.device)
    return measure_model(transformer, exam, options.out)


PARTS: Mapping[str, Callable[[Options], Measures]] = {
    "tokenizer": tokenizer,
    "autoencoder": autoencoder,
    "decoder": decoder,
    "towers": towers,
    "model": model,
}


def main() -> None:
    """Train one part, save it, measure it and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the measurements")
    parser.add_argument("--minutes", type=float, default=7.0, help="training time, without what is measured after it")
    parser.add_argument("--recogniser", type=Path, help="dlib's .dat file, where face-recognition-models is missing")
    parser.add_argument("--commit", help="what is run, where this is no git checkout")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 4
    options.out.mkdir(parents=True, exist_ok=True)
    measures = PARTS[options.part](
        Options(out=options.out, seconds=60 * options.minutes, device=device, recogniser=options.recogniser)
    )
    rows = [
        Row(name=options.part, metric=metric, value=value, unit=unit, floor=floor)
        for metric, (value, unit, floor) in measures.items()
    ]
    rows.append(Row(name=options.part, metric="training", value=options.minutes, unit="min"))
    write_results(options.part, rows, options.out, machine=machine_name(device), commit=options.commit)


if __name__ == "__main__":
    main()
