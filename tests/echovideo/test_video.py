"""The MP4 writer and reader, on real encodes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from echovideo.video import Video, VideoError, decode_mp4, encode_mp4, first_frame, poster_jpeg, sample_mp4

FPS = 16


def moving_picture(num_frames: int = 49, height: int = 96, width: int = 160) -> NDArray[np.uint8]:
    t, y, x = np.ogrid[:num_frames, :height, :width]
    red = 128 + 90 * np.sin((x + 4 * t) / 60) * np.cos(y / 50)
    green = 128 + 90 * np.cos((y + 2 * t) / 70)
    blue = 128 + 80 * np.sin((x + y - 3 * t) / 90)
    return np.stack(np.broadcast_arrays(red, green, blue), axis=-1).astype(np.uint8)


def box_order(content: bytes) -> list[str]:
    """The names of an MP4 file's top-level boxes (ISO/IEC 14496-12, 4.2), in order."""
    names, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        names.append(content[at + 4 : at + 8].decode())
        at += size
    return names


def test_encode_mp4_moving_picture_round_trips_above_38_db(tmp_path: Path) -> None:
    frames = moving_picture()
    encode_mp4(frames, tmp_path / "a.mp4", fps=FPS, metadata={})
    decoded = decode_mp4(tmp_path / "a.mp4")
    assert decoded.dtype == np.uint8
    assert decoded.shape == frames.shape
    error = np.mean((frames.astype(np.float64) - decoded) ** 2)
    assert 10 * np.log10(255**2 / error) > 38


def test_encode_mp4_flat_patches_keep_their_colour_within_3_levels(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 150, 120), (30, 60, 90)]
    frames = np.repeat(np.array(colours, np.uint8), 64, axis=0)[None, None].repeat(9, axis=0).repeat(64, axis=1)
    encode_mp4(frames, tmp_path / "a.mp4", fps=FPS, metadata={})
    decoded = decode_mp4(tmp_path / "a.mp4").astype(int)
    for index, colour in enumerate(colours):
        patch = decoded[:, 16:48, 64 * index + 16 : 64 * index + 48]
        assert np.abs(patch - colour).max() <= 3, colour


def test_encode_mp4_luma_is_bt709_limited_range_and_tagged(tmp_path: Path) -> None:
    frames = np.zeros((9, 32, 96, 3), np.uint8)
    frames[:, :, :32] = (0, 255, 0)
    frames[:, :, 32:64] = 255
    encode_mp4(frames, tmp_path / "a.mp4", fps=FPS, metadata={})
    with av.open(str(tmp_path / "a.mp4"), "r") as container:
        stream = container.streams.video[0]
        picture = next(container.decode(stream))
        context = stream.codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert context.pix_fmt == "yuv420p"
        luma = picture.to_ndarray()[:32].astype(int)
    # BT.709: green's luma is 16 + 219 * 0.7152 = 172.6; BT.601 would give 144.6, full range 182.4.
    assert abs(luma[16, 16] - 173) <= 1
    assert abs(luma[16, 48] - 235) <= 1
    assert abs(luma[16, 80] - 16) <= 1


def test_encode_mp4_record_gives_digest_shape_and_duration(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video = encode_mp4(moving_picture(), path, fps=FPS, metadata={})
    content = path.read_bytes()
    assert video == Video(
        uri=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        width=160,
        height=96,
        num_frames=49,
        fps=FPS,
    )
    assert video.duration_s == 49 / 16
    assert decode_mp4(path).shape == (49, 96, 160, 3)
    with av.open(str(path), "r") as container:
        assert container.duration == pytest.approx(49 / 16 * av.time_base, abs=1000)


def test_encode_mp4_on_one_and_two_processors_gives_the_same_bytes(tmp_path: Path) -> None:
    frames = moving_picture()

    def digest(processors: set[int]) -> str:
        # Affinity belongs to the calling thread, and the encoder's threads inherit it.
        os.sched_setaffinity(0, processors)
        return encode_mp4(frames, tmp_path / f"{len(processors)}.mp4", fps=FPS, metadata={"seed": "7"}).sha256

    processors = sorted(os.sched_getaffinity(0))
    digests = []
    for count in (1, 2, 2):
        with ThreadPoolExecutor(1) as thread:
            digests.append(thread.submit(digest, set(processors[:count])).result())
    assert len(set(digests)) == 1


def test_encode_mp4_at_once_in_two_threads_gives_the_same_bytes(tmp_path: Path) -> None:
    frames = moving_picture()
    with ThreadPoolExecutor(2) as threads:
        videos = list(threads.map(lambda i: encode_mp4(frames, tmp_path / f"{i}.mp4", fps=FPS, metadata={}), range(4)))
    assert len({video.sha256 for video in videos}) == 1


def test_encode_mp4_index_comes_before_the_pictures(tmp_path: Path) -> None:
    encode_mp4(moving_picture(), tmp_path / "a.mp4", fps=FPS, metadata={})
    names = box_order((tmp_path / "a.mp4").read_bytes())
    assert names.index("moov") < names.index("mdat")


def test_encode_mp4_key_frames_are_at_most_a_second_apart(tmp_path: Path) -> None:
    encode_mp4(moving_picture(), tmp_path / "a.mp4", fps=FPS, metadata={})
    with av.open(str(tmp_path / "a.mp4"), "r") as container:
        times = [float(frame.time) for frame in container.decode(video=0) if frame.key_frame]
    assert times[0] == 0
    assert max(np.diff([*times, 49 / FPS])) <= 1.0 + 1 / FPS


def test_encode_mp4_metadata_is_in_the_container(tmp_path: Path) -> None:
    making = {"prompt": 'a woman says "caf\u00e9" <b>', "seed": "3"}
    encode_mp4(moving_picture(9), tmp_path / "a.mp4", fps=FPS, metadata={"title": "row-1", **making})
    with av.open(str(tmp_path / "a.mp4"), "r") as container:
        assert container.metadata["title"] == "row-1"
        assert json.loads(container.metadata["comment"]) == making


def test_decode_mp4_from_bytes_equals_from_path(tmp_path: Path) -> None:
    encode_mp4(moving_picture(9), tmp_path / "a.mp4", fps=FPS, metadata={})
    from_path = decode_mp4(tmp_path / "a.mp4")
    assert np.array_equal(decode_mp4((tmp_path / "a.mp4").read_bytes()), from_path)


def test_sample_mp4_gives_evenly_spaced_frames_with_the_ends(tmp_path: Path) -> None:
    encode_mp4(moving_picture(), tmp_path / "a.mp4", fps=FPS, metadata={})
    frames = decode_mp4(tmp_path / "a.mp4")
    assert np.array_equal(sample_mp4(tmp_path / "a.mp4", 5), frames[[0, 12, 24, 36, 48]])
    assert np.array_equal(first_frame((tmp_path / "a.mp4").read_bytes()), frames[0])


def test_poster_jpeg_is_a_small_picture_of_the_frame() -> None:
    frame = moving_picture(1, 480, 848)[0]
    poster = poster_jpeg(frame)
    assert len(poster) < 16_000
    with Image.open(io.BytesIO(poster)) as image:
        assert image.size == (320, 181)
        assert np.abs(np.asarray(image, float).mean((0, 1)) - frame.mean((0, 1))).max() < 3


def test_encode_mp4_into_a_missing_folder_raises_video_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="No such file") as caught:
        encode_mp4(moving_picture(9), tmp_path / "missing" / "a.mp4", fps=FPS, metadata={})
    assert caught.value.code == "video_unwritable"
    assert "missing/a.mp4" in caught.value.message


@pytest.mark.parametrize("keep", [0, 3000, 7000])
def test_decode_mp4_of_a_cut_file_raises_video_error(tmp_path: Path, keep: int) -> None:
    encode_mp4(moving_picture(), tmp_path / "a.mp4", fps=FPS, metadata={})
    content = (tmp_path / "a.mp4").read_bytes()
    assert len(content) > 7000
    with pytest.raises(VideoError, match="cannot read the video") as caught:
        decode_mp4(content[:keep])
    assert caught.value.code == "video_unreadable"


def test_decode_mp4_of_a_sound_file_raises_video_error() -> None:
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(VideoError, match="holds no pictures"):
        decode_mp4(sound.getvalue())
