"""Data sets as the curriculum sees them: frames by number, and the facts that must agree between tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.units import FLAG

STATE, ACTION = "observation.state", "action"
IMAGES = "observation.images."
IDENTITY_FILE = "meta/kuavo.json"
Stats = Mapping[str, Mapping[str, Any]]


class DataError(UserError):
    """A data set is missing, empty, or does not go with the others."""


class Frames(Protocol):
    """A map-style data set of frames."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Facts:
    """What must agree between data sets that one policy learns from. Cameras: name to (height, width)."""

    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]
    # Where the data set states them: the robot's fingerprint, and the unit of each joint by name.
    fingerprint: str | None = None
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        return {STATE: len(self.state_names), ACTION: len(self.action_names)}

    @property
    def flags(self) -> tuple[int, ...]:
        """Places in the action of what says whether the base moves, by the unit its description states."""
        return tuple(i for i, name in enumerate(self.action_names) if self.units.get(name) == FLAG)


@dataclass(frozen=True)
class TaskSource:
    """A task's data: frames, the episode of each, facts, and the statistics of its vectors."""

    name: str
    frames: Frames
    episodes: NDArray[np.int64]  # of each frame; frames of an episode stand together, in time order
    facts: Facts
    stats: Stats
    vectors: Frames | None = None  # the same frames without pictures, where that is cheaper to read
    stamp: str = ""  # changes with the content of the data's files; for what is kept beside them

    def __post_init__(self) -> None:
        if len(self.frames) != len(self.episodes):
            raise DataError(
                f"{self.name} has {len(self.frames)} frames but episode numbers for {len(self.episodes)}"
            )
        if not len(self.episodes):
            raise DataError(f"the data set of {self.name} is empty")
        changes = np.flatnonzero(np.diff(self.episodes)) + 1
        starts = self.episodes[np.concatenate([[0], changes])]
        if len(np.unique(starts)) != len(starts):
            raise DataError(f"the frames of an episode of {self.name} do not stand together")

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the layout: names, and how many frames each episode has."""
        numbers, lengths = np.unique(self.episodes, return_counts=True)
        content = [
            self.name,
            self.facts.state_names,
            self.facts.action_names,
            sorted((name, *size) for name, size in self.facts.cameras.items()),
            self.facts.fps,
            numbers.tolist(),
            lengths.tolist(),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Joined:
    """Several data sets of one task behind each other."""

    def __init__(self, parts: Sequence[Frames]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (int(self._ends[part - 1]) if part else 0)]


def require_agreement(name: str, facts: Facts, others: Mapping[str, Facts]) -> None:
    """Fail with one sentence unless a task's data goes with that of every other task.

    State and action of one must begin with those of the other: task 4 adds the base behind the arms, and a
    robot with more joints may continue what a smaller one has learnt.
    """
    for other, theirs in others.items():
        if facts.fps != theirs.fps:
            raise DataError(
                f"{name} has {facts.fps:g} frames per second and {other} {theirs.fps:g}: a chunk would mean "
                "different times; convert both at the same rate"
            )
        for what, ours, their in (
            ("state", facts.state_names, theirs.state_names),
            ("action", facts.action_names, theirs.action_names),
        ):
            for place, (a, b) in enumerate(zip(ours, their, strict=False)):
                if a != b:
                    raise DataError(f"{what}[{place}] is {a} in {name} and {b} in {other}")
        for joint in sorted(facts.units.keys() & theirs.units.keys()):
            if facts.units[joint] != theirs.units[joint]:
                raise DataError(
                    f"{joint} is in {facts.units[joint]} in {name} and in {theirs.units[joint]} in {other}; "
                    "convert both with robot descriptions that agree"
                )
        _require_cameras(name, facts, other, theirs)
        same_layout = facts.widths == theirs.widths
        known = facts.fingerprint is not None and theirs.fingerprint is not None
        if same_layout and known and facts.fingerprint != theirs.fingerprint:
            raise DataError(
                f"{name} was recorded on the robot with fingerprint {facts.fingerprint}, {other} on "
                f"{theirs.fingerprint}; convert both with the same robot description"
            )


def _require_cameras(name: str, facts: Facts, other: str, theirs: Facts) -> None:
    if facts.cameras.keys() != theirs.cameras.keys():
        raise DataError(
            f"{name} has the cameras {', '.join(sorted(facts.cameras)) or 'none'}, {other} has "
            f"{', '.join(sorted(theirs.cameras)) or 'none'}; one policy needs the same cameras in all tasks"
        )
    for camera, size in facts.cameras.items():
        if size != theirs.cameras[camera]:
            (h, w), (h2, w2) = size, theirs.cameras[camera]
            raise DataError(
                f"{camera} is {w} x {h} pixels in {name} and {w2} x {h2} in {other}; convert both "
                "at the same size"
            )


def widest(facts: Sequence[Facts]) -> Facts:
    """The facts of the robot that can do all: those of the data set with the most dimensions."""
    return max(facts, key=lambda each: (len(each.action_names), len(each.state_names)))


def join(name: str, parts: Sequence[TaskSource]) -> TaskSource:
    """Several data sets as one task's; episodes are numbered on."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for number, part in enumerate(parts[1:], 2):
        require_agreement(f"data set {number} of {name}", part.facts, {"its first": first.facts})
        if part.facts.widths != first.facts.widths:
            raise DataError(
                f"data set {number} of {name} is {part.facts.widths[ACTION]} wide in the action and its "
                f"first {first.facts.widths[ACTION]}; one task has one width"
            )
    episodes, base = [], 0
    for part in parts:
        episodes.append(part.episodes - part.episodes.min() + base)
        base = int(episodes[-1].max()) + 1
    return TaskSource(
        name,
        Joined([part.frames for part in parts]),
        np.concatenate(episodes),
        first.facts,
        pooled_stats([(part.stats, len(part.episodes)) for part in parts]),
        vectors=None
        if any(p.vectors is None for p in parts)
        else Joined([p.vectors for p in parts if p.vectors]),
        stamp=" ".join(part.stamp for part in parts),
    )


def pooled_stats(parts: Sequence[tuple[Stats, int]]) -> dict[str, dict[str, Any]]:
    """Mean, deviation and extremes of data sets taken together, of what normalisation and drift need."""
    total = sum(frames for _, frames in parts)
    result: dict[str, dict[str, Any]] = {}
    for key in (STATE, ACTION):
        mean = sum(_vector(stats, key, "mean") * n for stats, n in parts) / total
        square = sum(
            (_vector(stats, key, "std") ** 2 + (_vector(stats, key, "mean") - mean) ** 2) * n
            for stats, n in parts
        )
        result[key] = {
            "mean": mean,
            "std": np.sqrt(square / total),
            "min": np.min([_vector(stats, key, "min") for stats, _ in parts], axis=0),
            "max": np.max([_vector(stats, key, "max") for stats, _ in parts], axis=0),
        }
    return result


def _vector(stats: Stats, key: str, name: str) -> NDArray[np.float64]:
    try:
        return np.asarray(stats[key][name], np.float64).reshape(-1)
    except KeyError:
        raise DataError(f"the data set's statistics lack {name} of {key}; convert it again") from None


def read_identity(folder: Path) -> Mapping[str, Any] | None:
    """What a data set of our converter says about its robot; None for other LeRobot data sets."""
    file = folder / IDENTITY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
