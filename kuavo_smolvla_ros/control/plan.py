"""What is to be done when: chunks joined into one continuous trajectory, looked up by time.

A plan is a piecewise cubic through knots with stated slopes. A cubic piece is fixed by its two ends, so
putting a knot on it changes nothing: joining a new chunk at `now` leaves all before `now` as it was. A
late, doubled or reordered chunk can only change what lies ahead, and that only by a bounded blend.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.chunk import NS_PER_S, ActionChunk, FloatArray
from kuavo_smolvla_ros.control.gates import BoolArray, Gates
from kuavo_smolvla_ros.robot.limits import Limits

HISTORY_NS = NS_PER_S  # what is kept behind `now`, for those who look back
BLEND_SAMPLE_NS = 20_000_000  # spacing of knots inside a blend


@dataclass(frozen=True)
class BlendSettings:
    """How long two chunks overlap at a seam: as long as their difference needs, between these bounds."""

    shortest_s: float = 0.1
    longest_s: float = 0.5
    share: float = 0.5
    """Share of the velocity and acceleration limits that closing the difference may use."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Knots of a trajectory; `switches` marks joints that jump at a knot and are never interpolated."""

    times_ns: NDArray[np.int64]
    values: FloatArray
    slopes: FloatArray
    switches: NDArray[np.bool_]
    task: str
    sequence: int

    @property
    def valid_until_ns(self) -> int:
        """Time of the last step; after it there is nothing to do but stop."""
        return int(self.times_ns[-1])

    def at(self, now_ns: int) -> tuple[FloatArray, FloatArray]:
        """Position and velocity at a time; before the first and after the last knot that knot, at rest."""
        positions, velocities = self.sample(np.array([now_ns], dtype=np.int64))
        return positions[0], velocities[0]

    def sample(self, times_ns: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Positions and velocities at many times, one row each."""
        knots = self.times_ns
        left = np.clip(np.searchsorted(knots, times_ns, side="right") - 1, 0, len(knots) - 2)
        span_s = ((knots[left + 1] - knots[left]) / NS_PER_S)[:, None]
        x = np.clip(((times_ns - knots[left]) / NS_PER_S)[:, None] / span_s, 0.0, 1.0)
        p0, p1 = self.values[left], self.values[left + 1]
        m0, m1 = self.slopes[left] * span_s, self.slopes[left + 1] * span_s
        rise = p1 - p0
        c2, c3 = 3.0 * rise - 2.0 * m0 - m1, m0 + m1 - 2.0 * rise
        position = p0 + x * (m0 + x * (c2 + x * c3))
        velocity = (m0 + x * (2.0 * c2 + x * 3.0 * c3)) / span_s
        at_end = (times_ns >= knots[-1])[:, None]
        outside = ((times_ns < knots[0]) | (times_ns > knots[-1]))[:, None]
        position = np.where(at_end, self.values[-1], np.where(self.switches, p0, position))
        velocity = np.where(outside | self.switches, 0.0, velocity)
        return position, velocity

    def splice(
        self,
        chunk: ActionChunk,
        now_ns: int,
        limits: Limits,
        settings: BlendSettings,
        gates: Gates | None = None,
    ) -> Plan:
        """This plan up to `now_ns`, then a blend, then the chunk at its own times.

        What is not executed now has no value to blend from, and begins at once with the chunk's.
        """
        new = plan_from_chunk(chunk, limits, gates)
        cut = self.switches if gates is None else self.switches | ~gates.open(self.at(now_ns)[0])
        end_ns = min(now_ns + self._blend_ns(new, cut, now_ns, limits, settings), new.valid_until_ns)
        inside = new.times_ns[(new.times_ns > now_ns) & (new.times_ns < end_ns)]
        samples = max(2, -(-(end_ns - now_ns) // BLEND_SAMPLE_NS) + 1)
        # Offsets first: an absolute time in ns has more digits than a float.
        offsets = np.linspace(0, end_ns - now_ns, samples).astype(np.int64)
        window = np.union1d(now_ns + offsets, inside)
        positions, velocities = self._mixed(new, cut, window)
        before = (self.times_ns < now_ns) & (self.times_ns >= self._oldest_kept(now_ns))
        after = new.times_ns > end_ns
        return Plan(
            times_ns=np.concatenate([self.times_ns[before], window, new.times_ns[after]]),
            values=np.concatenate([self.values[before], positions, new.values[after]]),
            slopes=np.concatenate([self.slopes[before], velocities, new.slopes[after]]),
            switches=self.switches,
            task=chunk.task,
            sequence=chunk.sequence,
        )

    def _blend_ns(
        self, new: Plan, cut: BoolArray, now_ns: int, limits: Limits, settings: BlendSettings
    ) -> int:
        """A smooth step of height d over T peaks at velocity 1.5 d/T and acceleration 6 d/T^2."""
        gap = np.where(cut, 0.0, np.abs(new.at(now_ns)[0] - self.at(now_ns)[0]))
        by_velocity = 1.5 * gap / (settings.share * limits.velocity)
        by_acceleration = np.sqrt(6.0 * gap / (settings.share * limits.acceleration))
        needed_s = max(float(by_velocity.max()), float(by_acceleration.max()))
        return round(min(max(needed_s, settings.shortest_s), settings.longest_s) * NS_PER_S)

    def _mixed(self, new: Plan, cut: BoolArray, window: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """This plan at the window's start, the new one at its end, smooth in between but for what is cut."""
        (p, v), (q, w) = self.sample(window), new.sample(window)
        span_s = int(window[-1] - window[0]) / NS_PER_S
        x = ((window - window[0]) / NS_PER_S / span_s)[:, None]
        share, rate = x * x * (3.0 - 2.0 * x), 6.0 * x * (1.0 - x) / span_s
        position = np.where(cut, q, p + share * (q - p))
        velocity = np.where(cut, w, v + share * (w - v) + rate * (q - p))
        return position, velocity

    def _oldest_kept(self, now_ns: int) -> int:
        """The newest knot at or before the history's start, so that the history stays whole."""
        older = self.times_ns[self.times_ns <= now_ns - HISTORY_NS]
        return int(older[-1]) if older.size else int(self.times_ns[0])


def plan_from_chunk(chunk: ActionChunk, limits: Limits, gates: Gates | None = None) -> Plan:
    """A chunk that was not refused, as a plan. A joint without a velocity limit is a switch."""
    times = chunk.stamp_ns + chunk.times_ns
    values = chunk.values if gates is None else gates.executed(chunk.values, limits)
    switches = np.isinf(limits.velocity)
    slopes = monotone_slopes(chunk.times_ns / NS_PER_S, values)
    slopes[:, switches] = 0.0
    return Plan(times, values, slopes, switches, chunk.task, chunk.sequence)


def monotone_slopes(times_s: FloatArray, values: FloatArray) -> FloatArray:
    """Slopes of a smooth curve through the points that never leaves the range between two neighbours.

    Inside, the weighted harmonic mean of the two secants (Fritsch and Butland), zero at an extremum; at the
    ends the secant.
    """
    spans = np.diff(times_s)[:, None]
    secants = np.diff(values, axis=0) / spans
    slopes: FloatArray = np.zeros(values.shape)
    slopes[0], slopes[-1] = secants[0], secants[-1]
    left, right = secants[:-1], secants[1:]
    agree = left * right > 0.0
    w_left, w_right = spans[:-1] + 2.0 * spans[1:], 2.0 * spans[:-1] + spans[1:]
    weighted = w_left * right + w_right * left
    np.divide((w_left + w_right) * left * right, weighted, out=slopes[1:-1], where=agree)
    return slopes
