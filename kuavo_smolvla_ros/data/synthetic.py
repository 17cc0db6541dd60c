"""Episodes made of known signals and of moving, textured pictures that carry their own number.

For tests, measurements and the demonstration: what comes out of a dataset can be compared with what went in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.episode import Episode, FrameSource, Rejection
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.spec import RobotSpec

BITS = 16  # a picture carries its number as this many black or white blocks along its top edge


@dataclass(frozen=True)
class TexturedFrames:
    """A textured ground that pans under the camera, a bright disc that circles, and sensor noise."""

    length: int
    height: int
    width: int
    seed: int = 0
    first_number: int = 0
    noise: int = 4  # peak amplitude, of 255

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        rng = np.random.default_rng(self.seed)
        margin = 64
        ground = _texture(rng, self.height + margin, self.width + margin)
        noise = rng.integers(0, self.noise + 1, (self.height + margin, self.width + margin, 3), np.uint8)
        rows, columns = np.ogrid[: self.height, : self.width]
        radius = max(self.height // 12, 2)
        for step in range(self.length):
            phase = 2 * np.pi * step / 50
            dy, dx = (int(margin / 2 * (1 + f(phase))) for f in (np.sin, np.cos))
            frame = ground[dy : dy + self.height, dx : dx + self.width].copy()
            centre = self.height * (0.5 + 0.3 * np.sin(phase * 3)), self.width * (0.5 + 0.3 * np.cos(phase))
            frame[(rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2] = (220, 90, 40)
            oy, ox = rng.integers(0, margin, 2)
            frame += noise[oy : oy + self.height, ox : ox + self.width]  # the texture leaves head room
            _stamp(frame, self.first_number + step)
            yield frame


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth at several scales, like a scene and unlike white noise."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (4, 16, 64):
        grid = rng.random((cells + 1, cells + 1, 3), np.float32)
        total += _stretch(grid, height, width) / cells**0.5
    total -= total.min()
    return (total * (230 / total.max())).astype(np.uint8)


def _stretch(grid: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bilinear interpolation of a coarse grid."""
    y = np.linspace(0, grid.shape[0] - 1, height, endpoint=False, dtype=np.float32)
    x = np.linspace(0, grid.shape[1] - 1, width, endpoint=False, dtype=np.float32)
    iy, ix = y.astype(int), x.astype(int)
    fy, fx = (y - iy)[:, None, None], (x - ix)[None, :, None]
    top = grid[iy][:, ix] * (1 - fx) + grid[iy][:, ix + 1] * fx
    bottom = grid[iy + 1][:, ix] * (1 - fx) + grid[iy + 1][:, ix + 1] * fx
    return top * (1 - fy) + bottom * fy


def _stamp(frame: NDArray[np.uint8], number: int) -> None:
    size = frame.shape[1] // BITS
    for bit in range(BITS):
        frame[:size, bit * size : (bit + 1) * size] = 255 if number >> bit & 1 else 0


def read_number(frame: NDArray[np.uint8]) -> int:
    """The number a picture (HxWx3) carries; survives lossy coding."""
    size = frame.shape[1] // BITS
    blocks = (frame[1 : size - 1, bit * size + 1 : (bit + 1) * size - 1] for bit in range(BITS))
    return sum(1 << bit for bit, block in enumerate(blocks) if block.mean() > 127)


def signal(names: tuple[str, ...], length: int, fps: float, seed: int = 0) -> NDArray[np.float32]:
    """One sine per name, each with its own frequency and phase: [length, names]."""
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(0.1, 1.0, len(names)), rng.uniform(0, 2 * np.pi, len(names))
    time_s = np.arange(length)[:, None] / fps
    return np.sin(2 * np.pi * frequency * time_s + phase).astype(np.float32)


def synthetic_episode(
    spec: RobotSpec,
    length: int = 30,
    seed: int = 0,
    *,
    source: str = "synthetic",
    task: str = "task1_moving_grasp",
    instruction: str = "Pick up the moving object",
    size: tuple[int, int] | None = None,
) -> Episode:
    """An episode that `spec` could have recorded; `size` (height, width) replaces the cameras' own."""
    period_ns = round(1e9 / spec.fps)
    frames = {
        role: TexturedFrames(length, *(size or (camera.height, camera.width)), seed=seed * 101 + number)
        for number, (role, camera) in enumerate(spec.cameras.items())
    }
    return Episode(
        source=source,
        task=task,
        instruction=instruction,
        fps=spec.fps,
        stamps_ns=1_700_000_000_000_000_000 + seed * 10**12 + np.arange(length, dtype=np.int64) * period_ns,
        state=signal(spec.state_names, length, spec.fps, seed),
        action=signal(spec.action_names, length, spec.fps, seed + 1),
        frames=frames,
    )


@dataclass(frozen=True)
class BrokenFrames:
    """Pictures of which one cannot be decoded."""

    frames: FrameSource
    step: int

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for step, frame in enumerate(self.frames):
            if step == self.step:
                raise UserError(f"the picture at step {step} is truncated")
            yield frame


def write_recipe(path: Path, *episodes: Mapping[str, Any]) -> Path:
    """A stand-in for a recording: the arguments of `synthetic_episode`, or what is wrong with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(episodes))
    return path


def extract_recipe(path: Path, spec: RobotSpec, settings: Mapping[str, Any]) -> list[Episode | Rejection]:
    """What `write_recipe` wrote, as the reader of real recordings would hand it over."""
    parts: list[Episode | Rejection] = []
    for number, recipe in enumerate(json.loads(path.read_text())):
        source = f"{path.name}#{number}"
        recipe = {**settings, **recipe}
        if "reject" in recipe:
            parts.append(Rejection(source, recipe["reject"]))
            continue
        if "crash" in recipe:
            raise RuntimeError(recipe["crash"])
        broken = recipe.pop("broken_picture", None)
        episode = synthetic_episode(spec, source=source, **recipe)
        if broken is not None:
            last = list(episode.frames)[-1]
            frames = {**episode.frames, last: BrokenFrames(episode.frames[last], broken)}
            episode = replace(episode, frames=frames)
        parts.append(episode)
    return parts
