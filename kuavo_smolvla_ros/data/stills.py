"""Pictures kept one by one (PNG or JPEG) in the data files, for those who do not want video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.video import check_picture
from kuavo_smolvla_ros.errors import UsageError


@dataclass(frozen=True)
class StillSettings:
    """How single pictures are stored: png without loss, jpeg ten times smaller."""

    format: str = "png"
    quality: int = 95  # of jpeg: 1 .. 100

    def __post_init__(self) -> None:
        if self.format not in ("png", "jpeg"):
            raise UsageError(f"image format '{self.format}' is unknown; choose png or jpeg")
        if not 1 <= self.quality <= 100:
            raise UsageError(f"image quality {self.quality} lies outside 1..100")

    @property
    def suffix(self) -> str:
        return ".png" if self.format == "png" else ".jpg"


def encode_stills(
    pictures: Iterable[NDArray[np.uint8]],
    sink: IO[bytes],
    *,
    size: tuple[int, int],
    settings: StillSettings,
    observe: Callable[[int, NDArray[np.uint8]], None],
) -> tuple[int, ...]:
    """Write the encoded pictures one after another into `sink`; return the size of each in bytes."""
    # Level 1 of PNG is four times as fast as the default and ten percent larger.
    parameters = (
        [cv2.IMWRITE_PNG_COMPRESSION, 1]
        if settings.format == "png"
        else [cv2.IMWRITE_JPEG_QUALITY, settings.quality]
    )
    sizes = []
    for step, picture in enumerate(pictures):
        check_picture(picture, size, step)
        observe(step, picture)
        good, data = cv2.imencode(settings.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), parameters)
        if not good:
            raise ValueError(f"OpenCV did not encode the picture at step {step}")
        sink.write(data.tobytes())
        sizes.append(len(data))
    return tuple(sizes)


def split_stills(source: IO[bytes], sizes: Sequence[int], start: int, stop: int) -> Iterator[bytes]:
    """The encoded pictures from number `start` up to `stop`."""
    source.seek(sum(sizes[:start]))
    for size in sizes[start:stop]:
        yield source.read(size)
