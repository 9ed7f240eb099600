import numpy as np
import pytest
import torch

from echovideo import EchoVideoPipeline
from echovideo.conditioning import encode_prompt, pad_to_aspect, place_face_latents


@pytest.mark.parametrize(
    ("height", "width", "padded"),
    [
        (480, 848, (512, 904)),
        (848, 480, (904, 512)),
        (480, 480, (512, 512)),
        (480, 640, (512, 682)),
        (640, 480, (682, 512)),
    ],
)
def test_pad_face_to_published_sizes_is_centred_on_black(height: int, width: int, padded: tuple[int, int]) -> None:
    face = np.full((512, 512, 3), 255, np.uint8)
    image = pad_to_aspect(face, width / height)
    assert image.shape == (*padded, 3)
    assert int(image.astype(np.int64).sum()) == 512 * 512 * 3 * 255
    top, left = (padded[0] - 512) // 2, (padded[1] - 512) // 2
    assert image[top : top + 512, left : left + 512].min() == 255


def test_place_face_latents_other_frames_are_zero() -> None:
    face = torch.ones(16, 4, 6)
    placed = place_face_latents(face, 5)
    assert placed.shape == (1, 5, 16, 4, 6)
    assert float(placed.sum()) == 16 * 4 * 6
    assert torch.equal(placed[0, 0], face)


def test_encode_prompt_long_and_short_have_226_states(tiny_folder: object) -> None:
    pipeline = EchoVideoPipeline.from_pretrained(tiny_folder)
    short, long = (
        encode_prompt(pipeline.tokenizer, pipeline.text_encoder, prompt, 226) for prompt in ("a man", "a man " * 400)
    )
    assert short.shape == long.shape == (1, 226, 128)
    assert not torch.allclose(short[0, -1], long[0, -1])
