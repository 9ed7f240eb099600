"""The tiny model's parts with fresh weights: EchoVideo's own classes at laptop size."""

from __future__ import annotations

import itertools

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

from echovideo.faces.recogniser import EMBEDDING_WIDTH
from echovideo.model.config import TransformerConfig
from echovideo.synthetic.caption import caption
from echovideo.synthetic.clip import sample_conditions

SIDE, FRAMES = 96, 17
FACE_TOKENS_SIDE = 112
TEXT_TOKENS = 96
"""The longest drawn caption has 64; the published model's 226 would be half of all that the transformer computes."""

_WIDTH = 128
_VOCABULARY = 2048
_DRAWN_CAPTIONS = 20_000

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
        max_text_seq_length=TEXT_TOKENS,
        resampler_dim=160,
        resampler_depth=2,
        resampler_num_heads=3,
    )


def fresh_text_encoder() -> T5EncoderModel:
    """Return T5's encoder, 128 wide, 3 layers."""
    config = T5Config(
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
    return T5EncoderModel(config).eval()


def fresh_vae() -> AutoencoderKLCogVideoX:
    """Return CogVideoX's autoencoder at 3 million parameters: 4 x 8 x 8 pixels to 16 numbers."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(32, 48, 64, 64),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=16,
        sample_height=SIDE,
        sample_width=SIDE,
        scaling_factor=0.7,
    ).eval()


def fresh_image_encoder() -> SiglipVisionModel:
    """Return SigLIP's vision tower, 128 wide, 4 layers, 196 tokens of a 112 pixel face."""
    config = SiglipVisionConfig(
        hidden_size=_WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=FACE_TOKENS_SIDE,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def image_processor() -> SiglipImageProcessorPil:
    """Return what resizes a face for the vision tower."""
    return SiglipImageProcessorPil(size={"height": FACE_TOKENS_SIDE, "width": FACE_TOKENS_SIDE})


def scheduler() -> CogVideoXDPMScheduler:
    """Return the published scheduler."""
    return CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def train_tokenizer() -> PreTrainedTokenizerFast:
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
    drawn = sample_conditions(range(_DRAWN_CAPTIONS))
    corpus += [caption(condition, seed=condition.seed) for condition in drawn]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )
