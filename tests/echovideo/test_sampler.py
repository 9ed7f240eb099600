import math
from dataclasses import fields

import pytest
import torch

from echovideo.conditioning import Condition
from echovideo.errors import RequestError
from echovideo.pipeline import EchoVideoPipeline
from echovideo.request import GuidanceSchedule
from echovideo.sampler import SamplerState, advance, decode, denoise_step, guidance_scales, prepare
from tests.echovideo.parity import make_pipeline, recorded

SHAPE = {"height": 64, "width": 96, "num_frames": 9}
OPTIONS = {"num_inference_steps": 3, "guidance_scale": 6.0, "guidance_schedule": "constant"}


@pytest.fixture(scope="module")
def pipeline() -> EchoVideoPipeline:
    return make_pipeline(recorded("pipeline_dpm")[1])


@pytest.fixture(scope="module")
def condition() -> Condition:
    generator = torch.Generator().manual_seed(0)
    return Condition(
        fused_2ND=torch.randn(2, 226, 48, generator=generator),
        face_mean_CHW=torch.randn(16, 8, 12, generator=generator),
        face_std_CHW=torch.ones(16, 8, 12),
    )


def start(pipeline: EchoVideoPipeline, condition: Condition, seed: int = 1, **changes: object) -> SamplerState:
    options = {**SHAPE, **OPTIONS, **changes}
    generator = torch.Generator().manual_seed(seed)
    return prepare(pipeline.transformer, pipeline.vae, pipeline.scheduler, condition, generator=generator, **options)


def run(pipeline: EchoVideoPipeline, state: SamplerState) -> torch.Tensor:
    while not state.done:
        state = advance(state, denoise_step(pipeline.transformer, state))
    return state.latents_BFCHW


def test_guidance_published_gives_the_recorded_wave() -> None:
    scales = guidance_scales("published", 6.0, (999, 749, 499, 249))
    assert [round(scale, 3) for scale in scales] == [4.756, 1.938, 1.092, 1.010]


def test_guidance_cosine_falls_from_one_plus_scale_to_one() -> None:
    scales = guidance_scales("cosine", 6.0, tuple(range(999, 0, -20)))
    assert scales[0] == 7.0
    assert list(scales) == sorted(scales, reverse=True)
    assert math.isclose(scales[-1], 1.0, abs_tol=1e-6)


@pytest.mark.parametrize("schedule", ["published", "constant", "cosine"])
def test_guidance_of_scale_one_is_off_in_every_schedule(schedule: GuidanceSchedule) -> None:
    assert guidance_scales(schedule, 1.0, (999, 499)) == (1.0, 1.0)


def test_guidance_constant_is_the_scale_at_every_step() -> None:
    assert guidance_scales("constant", 2.5, (999, 499)) == (2.5, 2.5)


def test_prepare_face_latents_stand_in_the_first_frame_alone(pipeline: EchoVideoPipeline, condition: Condition) -> None:
    state = start(pipeline, condition)
    assert state.latents_BFCHW.shape == state.face_latents_BFCHW.shape == (1, 3, 16, 8, 12)
    assert float(state.face_latents_BFCHW[:, 0].abs().min()) > 0
    assert float(state.face_latents_BFCHW[:, 1:].abs().max()) == 0
    assert state.timesteps == (999, 666, 332)


def test_prepare_noise_is_drawn_before_the_faces_sample(pipeline: EchoVideoPipeline, condition: Condition) -> None:
    state = start(pipeline, condition, seed=5)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 3, 16, 8, 12, generator=generator)
    face = condition.face_mean_CHW + torch.randn(1, 16, 1, 8, 12, generator=generator)[0, :, 0]
    assert torch.equal(state.latents_BFCHW, noise)
    assert torch.equal(state.face_latents_BFCHW[0, 0], face * pipeline.vae.config.scaling_factor)


def test_denoise_step_guidance_one_gives_the_conditional_velocity(
    pipeline: EchoVideoPipeline, condition: Condition
) -> None:
    state = start(pipeline, condition, guidance_scale=1.0)
    model_input = torch.cat([state.latents_BFCHW, state.face_latents_BFCHW], dim=2)
    timestep = torch.tensor([999])
    expected = pipeline.transformer.denoise(model_input, condition.fused_2ND[1:], timestep, state.rotary)
    assert torch.equal(denoise_step(pipeline.transformer, state), expected)


def test_two_videos_interleaved_step_by_step_do_not_touch_each_other(
    pipeline: EchoVideoPipeline, condition: Condition
) -> None:
    alone = [run(pipeline, start(pipeline, condition, seed=seed)) for seed in (1, 2)]
    states = [start(pipeline, condition, seed=seed) for seed in (1, 2)]
    while not states[0].done:
        states = [advance(state, denoise_step(pipeline.transformer, state)) for state in states]
    for expected, state in zip(alone, states, strict=True):
        assert torch.equal(expected, state.latents_BFCHW)


def test_decode_latents_gives_frames_between_zero_and_one(pipeline: EchoVideoPipeline, condition: Condition) -> None:
    video = decode(pipeline.vae, start(pipeline, condition).latents_BFCHW)
    assert video.shape == (1, 9, 3, 64, 96)
    assert video.dtype == torch.float32
    assert 0 <= float(video.min()) < float(video.max()) <= 1


@pytest.mark.parametrize(
    ("change", "code"), [({"height": 60}, "invalid_size"), ({"num_frames": 8}, "invalid_num_frames")]
)
def test_prepare_impossible_shape_is_refused(
    pipeline: EchoVideoPipeline, condition: Condition, change: dict[str, int], code: str
) -> None:
    with pytest.raises(RequestError) as caught:
        start(pipeline, condition, **change)
    assert caught.value.code == code


def test_condition_bytes_read_back_equal(condition: Condition) -> None:
    again = Condition.from_bytes(condition.to_bytes())
    assert all(torch.equal(getattr(again, item.name), getattr(condition, item.name)) for item in fields(Condition))
