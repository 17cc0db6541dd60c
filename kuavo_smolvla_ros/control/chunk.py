"""An action chunk as a trajectory with times, and the one place that says whether it may be used.

A chunk is used whole or not at all: one bad number for one arm refuses both arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.gates import Gates
from kuavo_smolvla_ros.control.reasons import RefusalReason
from kuavo_smolvla_ros.robot.limits import Limits

FloatArray = NDArray[np.float64]
NS_PER_S = 1_000_000_000
MAX_POINTS = 1000


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Targets for `names` at `stamp_ns + times_ns[i]`; `stamp_ns` is when the observation was made.

    Building one checks nothing, so that what came over the wire can be recorded as it came; `refuse` decides.
    """

    stamp_ns: int
    times_ns: NDArray[np.int64]
    names: tuple[str, ...]
    values: FloatArray
    task: str
    sequence: int
    fingerprint: str

    @property
    def key(self) -> tuple[int, int]:
        """What makes one chunk newer than another: its observation, then its number."""
        return self.stamp_ns, self.sequence

    @property
    def end_ns(self) -> int:
        return self.stamp_ns + int(self.times_ns[-1])


@dataclass(frozen=True)
class Refusal:
    """A chunk of which nothing is used, with the reason and a sentence for the log."""

    reason: RefusalReason
    detail: str
    sequence: int


@dataclass(frozen=True, eq=False)
class Terms:
    """What a chunk must satisfy; arrays follow `limits.names`, which is the chunk's own order."""

    limits: Limits
    fingerprint: str
    max_excess: float
    """How far outside the position limits a value may lie before it must be in a wrong unit."""
    pose_at: NDArray[np.intp]
    """Places of the joints whose target of this moment is compared with the measured pose (the arms)."""
    max_distance: float
    max_age_s: float
    max_ahead_s: float
    max_span_s: float = 60.0
    gates: Gates | None = None
    """Of values that they keep from being executed, only finite ones are asked for."""


def uniform_times_ns(count: int, fps: float) -> NDArray[np.int64]:
    """Times of a chunk's points after its stamp: i / fps, without drift."""
    return np.round(np.arange(count) * (NS_PER_S / fps)).astype(np.int64)


def chunk_from_points(
    points: Sequence[Sequence[float]],
    *,
    stamp_ns: int,
    times_ns: Sequence[int],
    names: Sequence[str],
    task: str,
    sequence: int,
    fingerprint: str,
) -> ActionChunk | Refusal:
    """A chunk from the rows of a message; rows of different widths cannot even be recorded as an array."""
    widths = {len(row) for row in points}
    if len(widths) > 1:
        detail = f"points have between {min(widths)} and {max(widths)} positions"
        return Refusal(RefusalReason.WRONG_SHAPE, detail, sequence)
    width = widths.pop() if widths else 0
    values = np.array(points, dtype=np.float64).reshape(len(points), width)
    times = np.array(times_ns, dtype=np.int64)
    return ActionChunk(stamp_ns, times, tuple(names), values, task, sequence, fingerprint)


def refuse(
    chunk: ActionChunk,
    terms: Terms,
    now_ns: int,
    *,
    newest: tuple[int, int] | None = None,
    measured: FloatArray | None = None,
) -> Refusal | None:
    """Why this chunk must not be used now, or None.

    `newest` is the key of the newest chunk accepted so far; `measured` the pose of the joints at `pose_at`.
    """
    found = _malformed(chunk, terms) or _misplaced(chunk, terms, now_ns, newest)
    if found is None and measured is not None:
        found = _too_far(chunk, terms, now_ns, measured)
    return None if found is None else Refusal(found[0], found[1], chunk.sequence)


_Found = tuple[RefusalReason, str]


def _malformed(chunk: ActionChunk, terms: Terms) -> _Found | None:
    names, values, times = terms.limits.names, chunk.values, chunk.times_ns
    if chunk.fingerprint != terms.fingerprint:
        detail = f"made for robot '{chunk.fingerprint}', this one is '{terms.fingerprint}'"
        return RefusalReason.FOREIGN_FINGERPRINT, detail
    if chunk.names != names:
        return RefusalReason.WRONG_NAMES, _names_difference(chunk.names, names)
    if values.ndim != 2 or values.shape[1] != len(names) or times.shape != values.shape[:1]:
        detail = f"values {values.shape} at times {times.shape} for {len(names)} joints"
        return RefusalReason.WRONG_SHAPE, detail
    if len(values) < 2:
        return RefusalReason.WRONG_SHAPE, "a trajectory needs at least two points"
    if len(values) > MAX_POINTS:
        return RefusalReason.TOO_LONG, f"{len(values)} points (at most {MAX_POINTS})"
    if times[0] < 0 or bool(np.any(times[1:] <= times[:-1])):
        return RefusalReason.TIMES_NOT_INCREASING, "times must start at or after the stamp and increase"
    if times[-1] > terms.max_span_s * NS_PER_S:
        span_s = int(times[-1]) / NS_PER_S
        return RefusalReason.TOO_LONG, f"spans {span_s:.1f} s (at most {terms.max_span_s:g} s)"
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        return RefusalReason.NON_FINITE, f"{names[column]} is {values[row, column]} at point {row}"
    excess = np.maximum(terms.limits.lower - values, values - terms.limits.upper)
    if terms.gates is not None:
        excess = np.where(terms.gates.open(values), excess, 0.0)
    if excess.max() > terms.max_excess:
        row, column = np.unravel_index(int(np.argmax(excess)), excess.shape)
        detail = f"{names[column]} = {values[row, column]:.3g} at point {row}, wrong unit?"
        return RefusalReason.OUTSIDE_LIMITS, detail
    return None


def _misplaced(
    chunk: ActionChunk, terms: Terms, now_ns: int, newest: tuple[int, int] | None
) -> _Found | None:
    if newest is not None and chunk.key == newest:
        return RefusalReason.DUPLICATE, f"chunk {chunk.sequence} was seen before"
    if newest is not None and chunk.key < newest:
        return RefusalReason.OUT_OF_ORDER, f"chunk {chunk.sequence} is older than chunk {newest[1]}"
    age_s = (now_ns - chunk.stamp_ns) / NS_PER_S
    if age_s < -terms.max_ahead_s:
        return RefusalReason.FROM_THE_FUTURE, f"stamped {-age_s:.3f} s ahead of the clock"
    if chunk.end_ns <= now_ns:
        return RefusalReason.EXPIRED, f"ended {(now_ns - chunk.end_ns) / NS_PER_S:.3f} s ago"
    if age_s > terms.max_age_s:
        detail = f"from an observation {age_s:.3f} s old (at most {terms.max_age_s:g} s)"
        return RefusalReason.STALE, detail
    return None


def _too_far(chunk: ActionChunk, terms: Terms, now_ns: int, measured: FloatArray) -> _Found | None:
    times = chunk.times_ns
    offset = min(max(now_ns - chunk.stamp_ns, int(times[0])), int(times[-1]))
    right = int(np.searchsorted(times, offset, side="left"))
    left = max(right - 1, 0)
    span = int(times[right] - times[left])
    share = (offset - int(times[left])) / span if span else 0.0
    target = chunk.values[left] + share * (chunk.values[right] - chunk.values[left])
    distance = np.abs(target[terms.pose_at] - measured)
    if not distance.size or distance.max() <= terms.max_distance:
        return None
    worst = int(np.argmax(distance))
    name = terms.limits.names[terms.pose_at[worst]]
    detail = f"{name} is {distance[worst]:.2f} from the measured pose (at most {terms.max_distance:g})"
    return RefusalReason.TOO_FAR_FROM_POSE, detail


def _names_difference(theirs: tuple[str, ...], ours: tuple[str, ...]) -> str:
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or extra:
        return f"missing {', '.join(missing) or 'none'}; unknown {', '.join(extra) or 'none'}"
    return "the right joints in another order, or one of them twice"
