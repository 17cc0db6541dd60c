"""Pictures go straight into an encoder, one per camera, and episodes are laid end to end in one file.

An episode is encoded into memory (a small mp4 of its own); a file of the dataset is written once, packet by
packet, from such episodes. Nothing is dropped: what goes in is counted and compared with what comes out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UsageError, UserError

PIXELS = "yuv420p"
ENCODERS = {"libsvtav1": "libsvtav1", "h264": "libx264"}  # by LeRobot's name for them
CANONICAL = {"libsvtav1": "av1", "h264": "h264"}  # what a reader calls the product

# Deblocking and restoration cost a quarter of the encoder's time and bring 0.06 dB at the same file size.
# One thread per encoder: parallel bags and cameras use the cores better than threads within a picture do.
_SVT_PARAMETERS = "lp=1:enable-dlf=0:enable-cdef=0:enable-restoration=0"

_BIT_EXACT = {"fflags": "+bitexact"}  # no version of the library in the file

os.environ.setdefault("SVT_LOG", "1")  # the encoder's errors, not its settings
logging.getLogger("libav").setLevel(logging.ERROR)


@dataclass(frozen=True)
class VideoSettings:
    """How pictures are encoded. The defaults are LeRobot's codec, quality and distance of key frames."""

    codec: str = "libsvtav1"
    crf: int = 30  # the encoder's quality scale: 0 best, 51 (h264) or 63 (av1) worst
    gop: int = (
        2  # every n-th frame stands alone: small numbers make random access cheap, large ones files small
    )
    preset: str = "10"  # libsvtav1: 0 slow .. 13 fast; h264: veryslow .. ultrafast

    def __post_init__(self) -> None:
        if self.codec not in ENCODERS:
            raise UsageError(f"video codec '{self.codec}' is unknown; choose one of {', '.join(ENCODERS)}")
        worst = 63 if self.codec == "libsvtav1" else 51
        if not 0 <= self.crf <= worst:
            raise UsageError(f"video crf {self.crf} lies outside 0..{worst} of {self.codec}")
        if self.gop < 1:
            raise UsageError(f"video gop {self.gop} must be at least 1 (every frame a key frame)")

    @property
    def canonical_codec(self) -> str:
        return CANONICAL[self.codec]

    @property
    def options(self) -> dict[str, str]:
        """Without B-frames and with one thread the bytes depend on nothing but the pictures."""
        common = {"crf": str(self.crf), "g": str(self.gop), "preset": self.preset}
        if self.codec == "libsvtav1":
            return {**common, "svtav1-params": _SVT_PARAMETERS}
        return {**common, "bf": "0", "threads": "1"}


def encoder_versions() -> dict[str, str]:
    """What decides the encoder's bytes besides settings and pictures."""
    return {
        "av": av.__version__,
        **{k: ".".join(map(str, v)) for k, v in av.library_versions.items() if k != "libavdevice"},
    }


def encode(
    pictures: Iterable[NDArray[np.uint8]],
    sink: IO[bytes],
    *,
    fps: int,
    size: tuple[int, int],
    settings: VideoSettings,
    observe: Callable[[int, NDArray[np.uint8]], None],
) -> int:
    """Write pictures (HxWx3 RGB of `size` = height, width) as mp4 into `sink`; return how many there were."""
    height, width = size
    if height % 2 or width % 2:
        raise UserError(f"video needs even height and width, not {width}x{height}; store images instead")
    count = 0
    with av.open(sink, "w", format="mp4", options=_BIT_EXACT) as container:
        stream = container.add_stream(ENCODERS[settings.codec], rate=fps, options=settings.options)
        stream.width, stream.height, stream.pix_fmt = width, height, PIXELS
        stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
        try:
            for picture in pictures:
                check_picture(picture, size, count)
                observe(count, picture)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(frame))
                count += 1
        finally:  # an encoder wants to be told that this was all, also where a picture was bad
            container.mux(stream.encode())
    return count


def check_picture(picture: NDArray[np.uint8], size: tuple[int, int], step: int) -> None:
    if picture.dtype != np.uint8 or picture.shape != (*size, 3):
        got = f"{picture.shape[1]}x{picture.shape[0]}" if picture.ndim == 3 else str(picture.shape)
        raise UserError(
            f"the picture at step {step} is {got} {picture.dtype}, declared is {size[1]}x{size[0]} uint8 RGB"
        )


class PackedVideo:
    """One camera's episodes, end to end in one mp4. Each byte is written once."""

    def __init__(self, path: Path, fps: int) -> None:
        self.path = path
        self.frames = 0
        self._fps = fps
        # No moving of the index to the front of the file: that would write everything a second time.
        self._container = av.open(str(path), "w", format="mp4", options=_BIT_EXACT)
        self._stream: Any = None
        self._extradata: bytes | None = None

    def accepts(self, episode: IO[bytes]) -> bool:
        """Whether the episode can share a file with those before it (the same stream header)."""
        if self._stream is None:
            return True
        episode.seek(0)
        with av.open(episode) as source:
            return source.streams.video[0].codec_context.extradata == self._extradata

    def append(self, episode: IO[bytes]) -> int:
        """Copy an encoded episode's packets; return how many frames they hold."""
        episode.seek(0)
        with av.open(episode) as source:
            incoming = source.streams.video[0]
            time_base = incoming.time_base
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(incoming, opaque=True)
                self._stream.time_base = time_base
                self._extradata = incoming.codec_context.extradata
            ticks = _ticks_per_frame(time_base, self._fps)
            count = 0
            for packet in source.demux(incoming):
                if packet.dts is None:  # the demuxer's own end mark
                    continue
                packet.pts = packet.dts = (self.frames + count) * ticks
                packet.duration = ticks
                packet.stream = self._stream
                self._container.mux(packet)
                count += 1
        self.frames += count
        return count

    def close(self) -> None:
        """Finish the file, and read its index back: an index that was not written is a file that is lost."""
        self._container.close()
        found = count_frames(self.path)
        if found != self.frames:
            raise OSError(f"{self.path} holds {found} frames after writing {self.frames}")

    def abandon(self) -> None:
        self._container.close()


def cut(path: Path, start: int, count: int, sink: IO[bytes], fps: int) -> None:
    """Copy `count` frames from `start` on, a key frame, into an mp4 of their own; nothing is decoded."""
    with av.open(str(path)) as source, av.open(sink, "w", format="mp4", options=_BIT_EXACT) as container:
        incoming = source.streams.video[0]
        ticks = _ticks_per_frame(incoming.time_base, fps)
        stream = container.add_stream_from_template(incoming, opaque=True)
        stream.time_base = incoming.time_base
        source.seek(start * ticks, stream=incoming)
        copied = 0
        for packet in source.demux(incoming):
            if packet.dts is None or packet.pts < start * ticks:
                continue
            if copied == 0 and (packet.pts != start * ticks or not packet.is_keyframe):
                raise ValueError(f"{path}: frame {start} is not where an episode begins")
            packet.pts = packet.dts = copied * ticks
            packet.duration = ticks
            packet.stream = stream
            container.mux(packet)
            copied += 1
            if copied == count:
                break
    if copied != count:
        raise ValueError(f"{path} holds {copied} frames from {start} on, not {count}")


def _ticks_per_frame(time_base: Fraction, fps: int) -> int:
    ticks = Fraction(1, fps) / time_base
    if ticks.denominator != 1:
        raise ValueError(f"{fps} fps is no whole number of ticks of {time_base} s")
    return ticks.numerator


def count_frames(path: Path) -> int:
    """Frames by the file's index."""
    with av.open(str(path)) as container:
        return int(container.streams.video[0].frames)


def video_info(settings: VideoSettings, size: tuple[int, int], fps: int) -> dict[str, Any]:
    """What LeRobot's info.json says about a video feature."""
    return {
        "video.height": size[0],
        "video.width": size[1],
        "video.codec": settings.canonical_codec,
        "video.pix_fmt": PIXELS,
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
