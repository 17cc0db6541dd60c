"""Videos of an episode: the scene from outside above what the robot's three cameras see."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import ROLES, overview
from kuavo_smolvla_ros.sim.simulation import Simulation

OVERVIEW_SIZE = (480, 640)
CAMERA_SIZE = (160, 212)
VIDEO_WIDTH = 640
JPEG_QUALITY = 80
PERIODS_PER_FRAME = 5
FPS = round(1 / (PERIODS_PER_FRAME * kuavo.CONTROL_PERIOD_S))


def frame(sim: Simulation) -> NDArray[np.uint8]:
    """One picture of everything there is to see."""
    top = sim.cameras.picture(sim.data, overview(wide=sim.task.mobile), OVERVIEW_SIZE)
    row = np.hstack([sim.cameras.picture(sim.data, role, CAMERA_SIZE) for role in ROLES])
    bottom = np.pad(row, ((0, 0), (0, VIDEO_WIDTH - row.shape[1]), (0, 0)))
    return np.vstack([top, bottom])


class Still:
    """Writes one picture of an episode, as it is at a given time."""

    def __init__(self, path: Path, sim: Simulation, at_s: float) -> None:
        self._path, self._sim, self._at_s = path, sim, at_s
        self.written = False

    def shoot(self) -> None:
        if self.written or self._sim.time_s < self._at_s - kuavo.CONTROL_PERIOD_S / 2:
            return
        picture = cv2.cvtColor(frame(self._sim), cv2.COLOR_RGB2BGR)
        try:
            self.written = cv2.imwrite(str(self._path), picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        except cv2.error as error:
            raise UserError(f"cannot write the picture {self._path}: its ending names no format") from error
        if not self.written:
            raise UserError(f"cannot write the picture {self._path}: no such folder, or not allowed")


class Film:
    """Writes an mp4 while an episode runs; hand `shoot` to the simulation as its watcher."""

    def __init__(self, path: Path, sim: Simulation) -> None:
        self._sim = sim
        self._periods = 0
        try:
            self._file = av.open(str(path), mode="w")
            self._stream = self._file.add_stream(
                "libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"}
            )
            self._stream.width, self._stream.height = VIDEO_WIDTH, OVERVIEW_SIZE[0] + CAMERA_SIZE[0]
            self._stream.pix_fmt = "yuv420p"
            self._file.start_encoding()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the video {path}: {error}") from error

    def shoot(self) -> None:
        if self._periods % PERIODS_PER_FRAME == 0:
            picture = av.VideoFrame.from_ndarray(frame(self._sim), format="rgb24")
            self._file.mux(self._stream.encode(picture))
        self._periods += 1

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.mux(self._stream.encode())
        self._file.close()
