from dataclasses import replace

import numpy as np
import pytest
import torch

from echovideo.errors import RequestError
from echovideo.pipeline import EchoVideoPipeline
from tests.echovideo.parity import formula, make_pipeline, recorded, relative_error


@pytest.mark.parametrize("record", ["pipeline_dpm", "pipeline_ddim"])
def test_pipeline_recorded_call_gives_recorded_latents_and_frames(record: str) -> None:
    arrays, facts = recorded(record)
    call, salt, text_dim = dict(facts["call"]), facts["salt"], facts["config"]["text_embed_dim"]
    seed, dynamic = call.pop("seed"), call.pop("use_dynamic_cfg")
    pipeline = make_pipeline(facts)
    prompt_embeds = formula("prompt_embeds", (1, 226, text_dim), salt)
    assert torch.equal(prompt_embeds[:, :2], arrays["prompt_embeds_head"])
    steps: list[torch.Tensor] = []
    video = pipeline(
        face_image=arrays["face"].numpy(),
        face_embedding=formula("face_embedding", (1, 512), salt),
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=formula("negative_prompt_embeds", (1, 226, text_dim), salt),
        guidance_schedule="published" if dynamic else "constant",
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        callback=lambda step, timestep, latents: steps.append(latents.clone()),
        **call,
    ).frames

    assert len(steps) == 4
    assert relative_error(steps[0], arrays["first_step_latents"]) < 5e-6
    assert relative_error(steps[-1], arrays["latents"]) < 5e-6
    assert video.shape == arrays["video"].shape
    assert relative_error(video, arrays["video"]) < 5e-4


@pytest.fixture(scope="module")
def pipeline() -> EchoVideoPipeline:
    return make_pipeline(recorded("pipeline_dpm")[1])


READY = {
    "face_image": np.zeros((512, 512, 3), np.uint8),
    "face_embedding": torch.zeros(1, 512),
    "prompt_embeds": torch.zeros(1, 226, 48),
    "negative_prompt_embeds": torch.zeros(1, 226, 48),
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "num_inference_steps": 1,
}


def test_pipeline_output_types_hold_the_same_video(pipeline: EchoVideoPipeline) -> None:
    outputs = {
        kind: pipeline(**READY, generator=torch.Generator().manual_seed(1), output_type=kind).frames
        for kind in ("latent", "pt", "np", "pil")
    }
    assert outputs["latent"].shape == (1, 3, 16, 8, 12)
    assert outputs["np"].shape == (1, 9, 64, 96, 3)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 1, 3, 4, 2).numpy())
    assert len(outputs["pil"][0]) == 9
    assert np.array_equal(np.asarray(outputs["pil"][0][4]), np.rint(outputs["np"][0, 4] * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 100}, "multiple of 16"),
        ({"num_frames": 10}, "9, 17, 25, 33, 41, 49"),
        ({"num_frames": None, "seconds": 9.0}, "allowed are 9 to 49"),
        ({"seconds": 1.0}, "not both"),
        ({"num_inference_steps": -1}, "outside 1 to 1000"),
        ({"guidance_scale": float("nan")}, "outside 1 to 30"),
        ({"guidance_schedule": "wave"}, "published, constant, cosine"),
        ({"output_type": "video"}, "latent, pt, np, pil"),
        ({"face_embedding": None}, "face_image and face_embedding together"),
        ({"prompt_embeds": None}, "prompt or prompt_embeds"),
        ({"prompt_embeds": None, "prompt": "hi"}, "no text encoder"),
    ],
)
def test_pipeline_impossible_call_is_refused_with_what_is_allowed(
    pipeline: EchoVideoPipeline, change: dict[str, object], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        pipeline(**{**READY, **change})


def test_pipeline_fuses_once_a_half_however_many_steps(
    pipeline: EchoVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse, calls = pipeline.transformer.fuse, []
    monkeypatch.setattr(pipeline.transformer, "fuse", lambda *inputs: calls.append(1) or fuse(*inputs))
    pipeline(**{**READY, "num_inference_steps": 3}, output_type="latent")
    assert len(calls) == 2


def test_pipeline_seconds_are_rounded_to_allowed_frames(pipeline: EchoVideoPipeline) -> None:
    frames = pipeline(**{**READY, "num_frames": None, "seconds": 1.0}, output_type="pt").frames
    assert frames.shape[1] == 17


def test_pipeline_without_a_shape_takes_that_of_the_model(
    pipeline: EchoVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = replace(pipeline.transformer.config, sample_height=8, sample_width=12, sample_frames=9)
    monkeypatch.setattr(pipeline.transformer, "config", trained)
    call = {name: value for name, value in READY.items() if name not in ("height", "width", "num_frames")}
    assert pipeline(**call, output_type="pt").frames.shape == (1, 9, 3, 64, 96)
