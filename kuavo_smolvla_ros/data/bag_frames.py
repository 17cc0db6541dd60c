"""The pictures of one camera in one episode, decoded from the recording when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.bag_storage import Channel
from kuavo_smolvla_ros.data.bag_types import decode
from kuavo_smolvla_ros.data.bags import FilePlace, open_bag
from kuavo_smolvla_ros.data.unpacked import Unpacked
from kuavo_smolvla_ros.robot.description import Camera
from kuavo_smolvla_ros.robot.image_files import JPEG_MAGIC, PNG_MAGIC, ImageError, jpeg_size, png_size
from kuavo_smolvla_ros.robot.images import decode_image

_MEASURES = ((JPEG_MAGIC, jpeg_size), (PNG_MAGIC, png_size))


@dataclass(frozen=True)
class BagFrames:
    """See `episode.FrameSource`: every pass opens the recording for itself, one picture at a time."""

    path: Path
    channel: Channel
    camera: Camera
    places: NDArray[np.int64]  # [T, 4], one `FilePlace` per grid step
    unpacked: Unpacked | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        with open_bag(self.path, survey=False, unpacked=self.unpacked) as bag:
            picture: NDArray[np.uint8] | None = None
            last: list[int] | None = None
            for place in self.places.tolist():
                if picture is None or place != last:  # a camera slower than the grid is seen several times
                    message = decode(self.channel, bag.read(FilePlace(*place)))
                    picture = decode_image(
                        message,
                        stream=self.channel.topic,
                        height=self.camera.height,
                        width=self.camera.width,
                    )
                    last = place
                yield picture


class SizeError(ImageError):
    """A picture that is whole, but of another size than declared."""


def check_picture(message: Any, camera: Camera, is_raw: bool) -> None:
    """Refuse what is truncated or of the wrong size, without decoding it.

    Of a compressed picture the structure is followed to its end; of a raw one the bytes are counted.
    """
    if is_raw:
        height, width = int(message.height), int(message.width)
        if len(message.data) != message.step * height:
            raise ImageError(
                f"the picture holds {len(message.data)} bytes, {message.step * height} belong to it"
            )
    else:
        data = memoryview(message.data)
        for magic, measure in _MEASURES:
            if data[: len(magic)] == magic:
                height, width = measure(data)
                break
        else:
            raise ImageError(f"the picture ('{message.format}') is neither JPEG nor PNG")
    if (height, width) != (camera.height, camera.width):
        raise SizeError(
            f"{camera.name} is {width}x{height}, declared is {camera.width}x{camera.height}; "
            "use the description of the robot that was recorded, or correct it"
        )
