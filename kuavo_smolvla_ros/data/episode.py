"""What passes from reading to writing: one episode on a uniform grid, its pictures decoded when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class FrameSource(Protocol):
    """One camera's pictures of one episode.

    Iterating yields one HxWx3 uint8 RGB picture per grid step, in order, decoded lazily with bounded memory.
    It can be iterated more than once, and the sources of one episode may be iterated in several threads at
    a time.
    A picture that cannot be decoded raises a `UserError`: the episode is then left out, whole.
    """

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[NDArray[np.uint8]]: ...


class Finding(Protocol):
    """Something the quality report will say; here it is only carried along."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Episode:
    """One demonstration, ready to be written."""

    source: str  # the recording's name (and the episode's number in it where it holds several)
    task: str  # for example "task2_weighing"
    instruction: str
    fps: float
    stamps_ns: NDArray[np.int64]  # [T] header time, uniform
    state: NDArray[np.float32]  # [T, S]
    action: NDArray[np.float32]  # [T, A]
    frames: Mapping[str, FrameSource]  # camera role -> pictures
    findings: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        length = len(self.stamps_ns)
        if length == 0:
            raise ValueError(f"{self.source}: an episode needs at least one step")
        if not self.instruction.strip():
            raise ValueError(f"{self.source}: an episode needs an instruction")
        for name, vectors in (("state", self.state), ("action", self.action)):
            if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != length:
                raise ValueError(
                    f"{self.source}: {name} is {vectors.dtype} {vectors.shape}, not float32 of {length} rows"
                )
            if not np.isfinite(vectors).all():
                row = int(np.argwhere(~np.isfinite(vectors))[0][0])
                raise ValueError(f"{self.source}: {name} is not finite at step {row}")
        if self.stamps_ns.dtype != np.int64:
            raise ValueError(f"{self.source}: stamps are {self.stamps_ns.dtype}, not int64")
        for role, frames in self.frames.items():
            if len(frames) != length:
                raise ValueError(f"{self.source}: {role} has {len(frames)} pictures for {length} steps")

    def __len__(self) -> int:
        return len(self.stamps_ns)


@dataclass(frozen=True)
class Rejection:
    """A recording (or a part of it) that is left out, and why: which topic, at which time."""

    source: str
    reason: str  # one sentence for the person who recorded it
    findings: tuple[Finding, ...] = field(default=())
