"""Faults that the simulator can play, so that what survives them can be tested with real messages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from kuavo_smolvla_ros.errors import UsageError


class Fault(str, Enum):
    """What goes wrong. A camera fault names its camera: `camera_drop:head_cam_h`."""

    NONE = "none"
    CAMERA_DROP = "camera_drop"  # no more pictures
    CAMERA_FREEZE = "camera_freeze"  # the same picture again and again, with fresh stamps
    CAMERA_CORRUPT = "camera_corrupt"  # the second half of each jpeg is missing
    STATE_DROP = "state_drop"  # no more joint states
    STATE_NAN = "state_nan"  # one joint reads NaN
    STATE_REORDER = "state_reorder"  # names and values in another order, still belonging together
    STATE_MISSING_JOINT = "state_missing_joint"  # one name less than there should be
    CLOCK_FORWARD = "clock_forward"  # /clock and stamps jump ahead by 5 s, once
    CLOCK_BACK = "clock_back"  # /clock and stamps jump back by 5 s, once


CAMERA_FAULTS = (Fault.CAMERA_DROP, Fault.CAMERA_FREEZE, Fault.CAMERA_CORRUPT)
CLOCK_JUMP_S = 5.0


@dataclass(frozen=True)
class ActiveFault:
    """A fault, and for camera faults the camera it strikes."""

    kind: Fault = Fault.NONE
    camera: str = ""

    @classmethod
    def parse(cls, text: str, cameras: tuple[str, ...]) -> ActiveFault:
        name, _, camera = text.partition(":")
        try:
            kind = Fault(name)
        except ValueError:
            raise UsageError(
                f"there is no fault '{name}'; choose one of {', '.join(f.value for f in Fault)}"
            ) from None
        if kind in CAMERA_FAULTS and camera not in cameras:
            raise UsageError(
                f"{kind.value} needs a camera, {kind.value}:NAME with NAME one of {', '.join(cameras)}"
            )
        if kind not in CAMERA_FAULTS and camera:
            raise UsageError(f"{kind.value} takes no camera")
        return cls(kind, camera)

    def strikes(self, kind: Fault, camera: str = "") -> bool:
        return self.kind is kind and self.camera == camera

    @property
    def clock_jump_s(self) -> float:
        return {Fault.CLOCK_FORWARD: CLOCK_JUMP_S, Fault.CLOCK_BACK: -CLOCK_JUMP_S}.get(self.kind, 0.0)


class PixelNoise:
    """Noise of a sensor, drawn once and laid over each picture at another offset.

    A picture without any would be the same to the bit while nothing moves, as only a dead camera's is; and to
    draw a million numbers for each would take longer than to render it.
    """

    def __init__(self, std: float) -> None:
        self.std = std
        self._grain = np.random.default_rng(0).normal(0.0, std, 1 << 20).round().astype(np.int16)

    def over(self, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The picture with noise, as uint8."""
        if self.std == 0.0:
            return picture
        start = int(rng.integers(len(self._grain)))
        grain = np.resize(np.roll(self._grain, -start), picture.shape)
        return np.clip(picture + grain, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class CameraQuality:
    """How a camera differs from a perfect one."""

    noise_std: float = 0.0
    latency_s: float = 0.0
    jitter_s: float = 0.0
    drop_rate: float = 0.0

    def delay_s(self, rng: np.random.Generator) -> float:
        return max(0.0, self.latency_s + (rng.normal(0.0, self.jitter_s) if self.jitter_s else 0.0))
