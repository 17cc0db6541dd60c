"""Off-screen OpenGL contexts, and what to install where there are none.

MuJoCo chooses its context class once, when it is first imported, and by default one that needs a window
system. The cameras therefore ask here for a context of their own, whatever was imported before; MUJOCO_GL
is still honoured.
"""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys
from typing import Any

from kuavo_smolvla_ros.errors import UserError

BACKENDS = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw", "cgl": "mujoco.cgl"}
LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
INSTALL_HINT = (
    "install a software OpenGL (Debian/Ubuntu: `apt install libegl1 libopengl0 libgl1-mesa-dri`, or `apt "
    "install libosmesa6` with MUJOCO_GL=osmesa), or run without cameras: states and physics need no OpenGL"
)


class GlError(UserError):
    """No OpenGL to render the cameras with."""


def choose_backend() -> str:
    """MUJOCO_GL if it is set; else the first headless backend this machine has a library for."""
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        if chosen not in BACKENDS:
            raise GlError(f"MUJOCO_GL={chosen} is not one of {', '.join(BACKENDS)}")
        return chosen
    if not sys.platform.startswith("linux"):
        return "cgl" if sys.platform == "darwin" else "glfw"
    for backend, library in LIBRARIES.items():
        if ctypes.util.find_library(library):
            return backend
    raise GlError(f"cannot render cameras: neither libEGL nor libOSMesa is installed; {INSTALL_HINT}")


def make_context(width: int, height: int) -> Any:
    """A current OpenGL context of the chosen backend."""
    backend = choose_backend()
    try:
        context = importlib.import_module(BACKENDS[backend]).GLContext(width, height)
        context.make_current()
    except (
        Exception
    ) as error:  # every backend fails in its own way: ImportError, AttributeError, RuntimeError
        raise GlError(f"cannot render cameras with {backend}: {error}; {INSTALL_HINT}") from error
    return context
