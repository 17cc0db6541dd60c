"""Pictures from the robot's cameras, rendered off-screen."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.sim.gl import make_context

ROLES = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")
Size = tuple[int, int]
"""Height and width in pixels."""
MAX_GEOMS = 500
LARGEST: Size = (960, 1280)


def sizes(height: int, width: int) -> dict[str, Size]:
    """All three cameras at one size."""
    return dict.fromkeys(ROLES, (height, width))


def overview(*, wide: bool = False) -> mujoco.MjvCamera:
    """A free camera that looks at the work from in front of the robot; `wide` shows the room it walks in."""
    view = mujoco.MjvCamera()
    if wide:
        view.lookat[:] = [0.0, 0.0, 0.85]
        view.distance, view.azimuth, view.elevation = 4.2, 112.0, -26.0
    else:
        view.lookat[:] = [0.35, 0.0, 0.95]
        view.distance, view.azimuth, view.elevation = 1.7, 150.0, -28.0
    return view


class Cameras:
    """Renders any camera at any size. It belongs to the thread that renders first, as OpenGL contexts do."""

    def __init__(self, model: mujoco.MjModel, cameras: Mapping[str, Size]) -> None:
        for role, size in cameras.items():
            _check_size(role, size)
        self._model = model
        self._cameras = dict(cameras)
        self._option = mujoco.MjvOption()
        self._gl: Any = None

    @property
    def sizes(self) -> Mapping[str, Size]:
        return self._cameras

    def render(self, data: mujoco.MjData) -> dict[str, NDArray[np.uint8]]:
        """Height x width x 3 RGB per camera."""
        return {role: self.picture(data, role, size) for role, size in self._cameras.items()}

    def picture(self, data: mujoco.MjData, camera: str | mujoco.MjvCamera, size: Size) -> NDArray[np.uint8]:
        """One picture from a named camera of the model, or from a free one."""
        if self._gl is None:
            self._open()
        if threading.get_ident() != self._thread:
            raise RuntimeError("cameras were first used in another thread; render in one thread only")
        self._gl.make_current()
        view = self._fixed_view(camera) if isinstance(camera, str) else camera
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        height, width = size
        rectangle = mujoco.MjrRect(0, 0, width, height)
        mujoco.mjr_render(rectangle, self._scene, self._context)
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, rectangle, self._context)
        # OpenGL's first row is the bottom one.
        return np.ascontiguousarray(pixels[::-1])

    def _fixed_view(self, name: str) -> mujoco.MjvCamera:
        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = self._model.camera(name).id
        return view

    def _open(self) -> None:
        height, width = LARGEST
        self._gl = make_context(width, height)
        self._thread = threading.get_ident()
        self._scene = mujoco.MjvScene(self._model, maxgeom=MAX_GEOMS)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._context = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)

    def close(self) -> None:
        """Free the OpenGL context; a later picture opens another."""
        if self._gl is None:
            return
        self._context.free()
        self._gl.free()
        self._gl = None


def _check_size(role: str, size: Size) -> None:
    if role not in ROLES:
        raise ValueError(f"there is no camera {role!r}; choose from {', '.join(ROLES)}")
    if not (0 < size[0] <= LARGEST[0] and 0 < size[1] <= LARGEST[1]):
        raise ValueError(f"{role}: size {size} is not within 1 x 1 .. {LARGEST[0]} x {LARGEST[1]}")
