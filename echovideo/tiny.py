"""The tiny model: EchoVideo's own classes at laptop size, in the published folder layout, from a seed.

It is not trained: its videos are coloured noise, and its model card says so. It exists so that every real part of
the system runs anywhere in seconds.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from echovideo.faces.recogniser import EMBEDDING_WIDTH, export_recogniser
from echovideo.model.card import TINY, write_card
from echovideo.model.config import TransformerConfig
from echovideo.model.transformer import EchoVideoTransformer3DModel
from echovideo.pipeline import EchoVideoPipeline

SEED = 20250122
_WIDTH = 128
_VOCABULARY = 2048

_CAPTION_PARTS = (
    "a person, the person, a woman, a man, an astronaut, an officer, a singer, a chef, a doctor, a teacher",
    "smiles at the camera, turns the head slowly to the left, turns the head slowly to the right, looks up and laughs, "
    "nods and speaks, walks through a garden, reads a letter by the window, raises the eyebrows in surprise, "
    "waves a hand, drinks a cup of coffee, dances in the rain, plays the piano, closes the eyes and breathes",
    "in a sunlit kitchen, on a quiet beach at dawn, in a busy city street at night, in front of a white wall, "
    "inside a spaceship with blue light, under green trees, in a warm library, on a stage with red curtains",
    "soft light and shallow depth of field, cinematic with film grain and warm colours, wearing a blue shirt, "
    "wearing glasses, with short brown hair and a black jacket, close-up with natural skin, gentle camera movement",
)


def tiny_config() -> TransformerConfig:
    """Return the tiny transformer's config: 256 wide, 6 blocks, a 128-wide face embedding."""
    return TransformerConfig(
        num_attention_heads=4,
        num_layers=6,
        time_embed_dim=128,
        text_embed_dim=_WIDTH,
        face_embed_dim=_WIDTH,
        face_features_embed_dim=EMBEDDING_WIDTH,
        sample_width=12,
        sample_height=12,
        sample_frames=17,
        resampler_dim=160,
        resampler_depth=2,
        resampler_num_heads=3,
    )


def build_tiny(folder: Path) -> None:
    """Write the tiny model's whole folder, face nets included, from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = _train_tokenizer()
        pipeline = EchoVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(
                T5Config(
                    vocab_size=_VOCABULARY,
                    d_model=_WIDTH,
                    d_kv=32,
                    d_ff=256,
                    num_layers=3,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                    is_encoder_decoder=False,
                    use_cache=False,
                )
            ).eval(),
            vae=AutoencoderKLCogVideoX(
                block_out_channels=(32, 48, 64, 64),
                layers_per_block=1,
                norm_num_groups=16,
                latent_channels=16,
                sample_height=96,
                sample_width=96,
                scaling_factor=0.7,
            ).eval(),
            transformer=EchoVideoTransformer3DModel(tiny_config()).eval(),
            scheduler=CogVideoXDPMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=1.0,
                timestep_spacing="trailing",
                clip_sample=False,
            ),
            image_encoder=SiglipVisionModel(
                SiglipVisionConfig(
                    hidden_size=_WIDTH,
                    intermediate_size=384,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    image_size=112,
                    patch_size=8,
                )
            ).eval(),
            image_processor=SiglipImageProcessorPil(size={"height": 112, "width": 112}),
        )
    pipeline.save_pretrained(folder)
    (folder / "face_encoder").mkdir()
    export_recogniser(folder / "face_encoder" / "recogniser.onnx")
    write_card(TINY, folder)


def ensure_tiny(models: Path) -> Path:
    """Return the tiny model's folder under `models`, building it there once; safe against a second builder."""
    folder = models / TINY.name
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=models))
    try:
        build_tiny(building)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, so that every language has tokens, with T5's special tokens and places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        min_frequency=1,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    parts = (part.split(", ") for part in _CAPTION_PARTS)
    corpus = [" ".join(words) for words in itertools.product(*parts)]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TransformerConfig().max_text_seq_length,
    )
