from __future__ import annotations

import numpy as np
import pytest
import torch

from echovideo.conditioning import encode_face_tokens, face_posterior
from echovideo.faces.recogniser import load_recogniser
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.pipeline import EchoVideoPipeline
from echovideo.request import GuidanceSchedule
from echovideo.tiny import parts
from echovideo.tiny.generate import generate
from echovideo.tiny.world import Encoders, Photos

PROMPTS = ["a person smiles at the camera", "a person with glasses looks up"]
STEPS, GUIDANCE = 2, 3.0


@pytest.fixture(scope="module")
def pipeline() -> EchoVideoPipeline:
    """Fresh parts; the autoencoder and the vision tower in bfloat16, as encoders are."""
    torch.manual_seed(0)
    return EchoVideoPipeline(
        tokenizer=parts.train_tokenizer(),
        text_encoder=parts.fresh_text_encoder(),
        vae=parts.fresh_vae().bfloat16(),
        transformer=EchoVideoTransformer3DModel(parts.tiny_config()).eval(),
        scheduler=parts.scheduler(),
        image_encoder=parts.fresh_image_encoder().bfloat16(),
        image_processor=parts.image_processor(),
    )


@pytest.fixture(scope="module")
def encoders(pipeline: EchoVideoPipeline) -> Encoders:
    return Encoders(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        image_encoder=pipeline.image_encoder,
        vae=pipeline.vae,
        recogniser=load_recogniser(),
        scaling_factor=pipeline.vae.config.scaling_factor,
    )


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return (torch.rand(2, 96, 96, 3, generator=torch.Generator().manual_seed(3)) * 255).byte().numpy()


@pytest.fixture(scope="module")
def photos(pipeline: EchoVideoPipeline, faces: np.ndarray) -> Photos:
    """What the pipeline makes of the faces, with embeddings by chance."""
    moments = [face_posterior(pipeline.vae, face, 96, 96) for face in faces]
    return Photos(
        tokens_BND=torch.cat(
            [encode_face_tokens(pipeline.image_processor, pipeline.image_encoder, face) for face in faces]
        ),
        embedding_BD=torch.randn(2, 128, generator=torch.Generator().manual_seed(4)),
        mean_BCHW=torch.stack([mean for mean, _ in moments]),
        std_BCHW=torch.stack([std for _, std in moments]),
    )


def one(photos: Photos, number: int) -> Photos:
    at = slice(number, number + 1)
    return Photos(
        tokens_BND=photos.tokens_BND[at],
        embedding_BD=photos.embedding_BD[at],
        mean_BCHW=photos.mean_BCHW[at],
        std_BCHW=photos.std_BCHW[at],
    )


def made(pipeline: EchoVideoPipeline, encoders: Encoders, photos: Photos, **changes: object) -> np.ndarray:
    """Return the first clip, from noise of seed 7."""
    clips = generate(
        pipeline.transformer,
        encoders,
        PROMPTS[:1],
        one(photos, 0),
        generator=torch.Generator().manual_seed(7),
        steps=STEPS,
        guidance=GUIDANCE,
        **changes,  # type: ignore[arg-type]
    )
    return clips.numpy()


@pytest.mark.parametrize("schedule", ["published", "constant"])
def test_generate_one_clip_is_what_the_pipeline_samples(
    pipeline: EchoVideoPipeline,
    encoders: Encoders,
    photos: Photos,
    faces: np.ndarray,
    schedule: GuidanceSchedule,
) -> None:
    output = pipeline(
        face_image=faces[0],
        face_embedding=photos.embedding_BD[:1],
        prompt=PROMPTS[0],
        height=96,
        width=96,
        num_frames=17,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        guidance_schedule=schedule,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    )
    expected = output.frames[0]
    clips = made(pipeline, encoders, photos, guidance_schedule=schedule)
    assert clips.shape == (1, 17, 96, 96, 3)
    assert np.abs(clips[0] / 255 - expected).mean() < 0.01
    other = made(pipeline, encoders, one(photos, 1), guidance_schedule=schedule)
    assert np.abs(other[0] / 255 - expected).mean() > 0.01


def test_generate_strength_of_the_face_latent_and_identity_change_the_clip(
    pipeline: EchoVideoPipeline, encoders: Encoders, photos: Photos
) -> None:
    def latents(strength: float, identity: bool = True) -> np.ndarray:
        return made(pipeline, encoders, photos, face_latent=strength, identity=identity).astype(float)

    off, half, on = latents(0.0), latents(0.5), latents(1.0)
    assert np.abs(off - on).mean() > np.abs(half - on).mean() > 0
    assert np.abs(on - latents(1.0, identity=False)).mean() > 0
