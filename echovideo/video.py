"""The video file: H.264 in MP4, written from frames and read back to frames."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from echovideo.errors import EchoVideoError

# x264's bytes depend on its thread count, so the count is fixed, not taken from the machine: at sixteen a GPU does not
# wait for its video's file, and fewer processors do the same work in more time. Its AVX-512 code lets
# uninitialised memory into the rate control (the same frames gave 20 different files in 30 runs; with asm=0, and with
# any instruction set below AVX-512, always one), so the set is fixed too, at one that every x86-64 server has.
_ENCODER_THREADS = 16
_X264 = {"crf": "18", "preset": "medium", "flags": "+cgop", "x264-params": "asm=SSE2,SSSE3,SSE4.2"}
_SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


class VideoError(EchoVideoError):
    """A video file cannot be written or read; the message names the file and the codec library's reason."""

    code = "video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One finished video file: where it lies, what its bytes are, and its shape.

    `width` and `height` are pixels, `fps` frames per second, `sha256` the hex digest of the whole file.
    """

    uri: str
    sha256: str
    num_bytes: int
    width: int
    height: int
    num_frames: int
    fps: int

    @property
    def duration_s(self) -> float:
        """Playing time in seconds."""
        return self.num_frames / self.fps


def encode_mp4(frames_FHWC: NDArray[np.uint8], path: Path, *, fps: int, metadata: Mapping[str, str]) -> Video:
    """Write RGB frames as H.264 (crf 18, yuv420p, BT.709 limited range) in MP4 and return the file's record.

    frames_FHWC is uint8 RGB, 0 to 255, with even height and width. The same frames give the same bytes whatever
    the number of processors. The index comes before the pictures, so that a player can start before the download
    ends; groups of pictures are closed and at most a second long, so that seeking is quick.
    `metadata["title"]` becomes the container's title; the rest, how the video was made, its comment, as JSON.
    Raises VideoError.
    """
    assert frames_FHWC.dtype == np.uint8, frames_FHWC.dtype
    num_frames, height, width, channels = frames_FHWC.shape
    assert num_frames > 0, frames_FHWC.shape
    assert channels == 3, frames_FHWC.shape
    assert height % 2 == 0, frames_FHWC.shape
    assert width % 2 == 0, frames_FHWC.shape
    making = dict(metadata)
    title = making.pop("title", "")
    with (
        _codec_errors(f"cannot write the video {path}", code="video_unwritable"),
        av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata["title"] = title
        container.metadata["comment"] = json.dumps(making, sort_keys=True, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size = fps
        stream.thread_count = _ENCODER_THREADS
        # Not slices, PyAV's own choice: they cost quality, and a small picture has few.
        stream.thread_type = "FRAME"
        stream.colorspace = Colorspace.ITU709
        stream.color_range = ColorRange.MPEG
        stream.color_primaries = ColorPrimaries.BT709
        stream.color_trc = ColorTrc.BT709
        reformatter = VideoReformatter()
        for frame_HWC in frames_FHWC:
            container.mux(stream.encode(_to_bt709(frame_HWC, reformatter)))
        container.mux(stream.encode(None))
    return _record(path, width=width, height=height, num_frames=num_frames, fps=fps)


def decode_mp4(source: Path | bytes) -> NDArray[np.uint8]:
    """Return all frames of a video file, given by path or content, as uint8 RGB (F, H, W, 3); raises VideoError."""
    return _to_rgb(_decode(source))


def first_frame(source: Path | bytes) -> NDArray[np.uint8]:
    """Return the first frame (H, W, 3), as `decode_mp4` would give it, without decoding the others."""
    frame_HWC: NDArray[np.uint8] = _to_rgb(_decode(source, 1))[0]
    return frame_HWC


def sample_mp4(source: Path | bytes, num_frames: int) -> NDArray[np.uint8]:
    """Return `num_frames` evenly spaced frames, the first and last among them, as `decode_mp4` would give them."""
    frames = _decode(source)
    return _to_rgb([frames[round(at)] for at in np.linspace(0, len(frames) - 1, num_frames)])


@dataclass(frozen=True, slots=True, eq=False)
class StreamedFrame:
    """One frame of a file: its number, its RGB pixels, upright, and how many of these make a pixel of the file."""

    index: int
    pixels_HWC: NDArray[np.uint8]  # noqa: N815
    scale: float


def stream_frames(
    path: Path, *, indices: Collection[int] | None = None, stride: int = 1, max_side: int | None = None
) -> Iterator[StreamedFrame]:
    """Yield every `stride`-th frame of a video file of any length, or those of `indices`, one at a time in file order.

    Frames whose longer side is over `max_side` pixels are scaled down to it; a phone's turned pictures are turned
    upright. Numbers beyond the end give nothing. Raises VideoError where the file cannot be read or decoded.
    """
    last = None if indices is None else max(indices)
    reformatter = VideoReformatter()
    with _codec_errors(f"cannot read the video {path}", code="video_unreadable"), av.open(str(path), "r") as container:
        _check_has_pictures(container, str(path))
        for index, frame in enumerate(container.decode(video=0)):
            if index % stride == 0 if indices is None else index in indices:
                scale = 1.0 if max_side is None else min(1.0, max_side / max(frame.width, frame.height))
                size = {} if scale == 1 else {"width": int(frame.width * scale), "height": int(frame.height * scale)}
                rgb = reformatter.reformat(
                    frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_SCALER, threads=1, **size
                ).to_ndarray()
                yield StreamedFrame(
                    index, np.rot90(rgb, round(frame.rotation / 90)).astype(np.uint8, copy=False), scale
                )
            if index == last:
                return


def frame_rate(path: Path) -> float:
    """Return a video file's mean frames per second; raises VideoError."""
    with _codec_errors(f"cannot read the video {path}", code="video_unreadable"), av.open(str(path), "r") as container:
        _check_has_pictures(container, str(path))
        rate = container.streams.video[0].average_rate
    if not rate:
        raise VideoError(f"cannot read the video {path}: it does not say how fast it plays", code="video_unreadable")
    return float(rate)


def poster_jpeg(frame_HWC: NDArray[np.uint8], *, max_side: int = 320) -> bytes:
    """Return one uint8 RGB frame as a small JPEG, the still that stands for a video until it plays."""
    image = Image.fromarray(frame_HWC)
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def _record(path: Path, *, width: int, height: int, num_frames: int, fps: int) -> Video:
    content = path.read_bytes()
    return Video(
        uri=str(path),
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
    )


def _to_bt709(frame_HWC: NDArray[np.uint8], reformatter: VideoReformatter) -> VideoFrame:
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    return reformatter.reformat(
        frame,
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
        interpolation=_SCALER,
        threads=1,
    )


def _decode(source: Path | bytes, at_most: int | None = None) -> list[VideoFrame]:
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    with (
        _codec_errors(f"cannot read the video {name}", code="video_unreadable"),
        av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container,
    ):
        _check_has_pictures(container, name)
        return list(islice(container.decode(video=0), at_most))


def _to_rgb(frames: Sequence[VideoFrame]) -> NDArray[np.uint8]:
    reformatter = VideoReformatter()
    rgb = [
        reformatter.reformat(
            frame, format="rgb24", dst_color_range=ColorRange.JPEG, interpolation=_SCALER, threads=1
        ).to_ndarray()
        for frame in frames
    ]
    return np.stack(rgb).astype(np.uint8, copy=False)


def _check_has_pictures(container: InputContainer, name: str) -> None:
    if not container.streams.video:
        raise VideoError(f"cannot read the video {name}: it holds no pictures", code="video_unreadable")


@contextmanager
def _codec_errors(what: str, *, code: str) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, UnknownCodecError) as error:
        reason = error.strerror if isinstance(error, av.FFmpegError) else str(error)
        raise VideoError(f"{what}: {reason}", code=code) from error
