"""Short videos that any browser plays: what the robot's cameras saw, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEIGHT = 180
OPTIONS = {"crf": "26", "preset": "veryfast"}
HEAD = "observation.images.head_cam_h"


def video_of_episode(reader: Any, index: int, path: Path) -> None:
    """All cameras of an episode of a dataset, the head's first."""
    keys = sorted(reader.cameras, key=lambda key: (key != HEAD, key))
    streams = [reader.pictures(index, key) for key in keys]
    write_video(path, (side_by_side(pictures) for pictures in zip(*streams, strict=True)), reader.fps)


def video_of_recording(bag: Path, spec: Any, path: Path) -> None:
    """All cameras of a recording, at the rate a policy looks."""
    write_video(path, _pictures_of(bag, spec), spec.fps)


def _pictures_of(path: Path, spec: Any) -> Iterator[NDArray[np.uint8]]:
    """The newest picture of each camera, each time the grid asks."""
    from kuavo_smolvla_ros.data.bags import open_bag
    from kuavo_smolvla_ros.robot.images import decode_image
    from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns

    topics = {spec.streams[camera.stream].topic: role for role, camera in spec.cameras.items()}
    newest: dict[str, Any] = {}
    due_ns = 0
    with open_bag(path) as bag:
        for message in bag.messages(topics):
            stamp_ns = peek_stamp_ns(message.data)
            newest[topics[message.topic]] = message.decode()
            if len(newest) == len(topics) and stamp_ns >= due_ns:
                due_ns = stamp_ns + round(1e9 / spec.fps)
                yield side_by_side(decode_image(newest[role]) for role in spec.cameras)


def side_by_side(pictures: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures at one height in a row."""
    import cv2

    row = []
    for picture in pictures:
        width = round(picture.shape[1] * HEIGHT / picture.shape[0] / 2) * 2
        row.append(cv2.resize(picture, (width, HEIGHT), interpolation=cv2.INTER_AREA))
    return np.hstack(row)


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> int:
    """An mp4 of RGB pictures of one even size; how many there were."""
    import av

    count = 0
    with av.open(str(path), mode="w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream("libx264", rate=round(fps), options=OPTIONS)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            if count == 0:
                stream.height, stream.width = frame.shape[:2]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            count += 1
        file.mux(stream.encode())
    return count
