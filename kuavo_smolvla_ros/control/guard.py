"""Limits that hold between every two commands, whatever is asked for.

With q the command, h_k the time since the command before and v_k = (q_k - q_{k-1}) / h_k, every command has

    |v_k| <= v_max,    |v_k - v_{k-1}| <= a_max * h_k,    lower <= q_k <= upper,

starting from rest (v_0 = 0) where `start` was told the joint is. Why the three can always be met together,
for any sequence of h_k: keep the braking invariant

    (I)   v > 0  implies  q + v^2 / (2 a) <= upper        (and its mirror image at `lower`).

Brake by v' = max(0, v - a h), q' = q + v' h. If v' = 0 then q' = q, which is inside. Otherwise v = v' + a h,
so v^2/(2a) = v'^2/(2a) + v' h + a h^2/2 >= v'^2/(2a) + v' h, hence q' + v'^2/(2a) <= q + v^2/(2a) <= upper:
(I) holds again, whatever h was. For v' > 0 the other limit recedes, so it needs no look. Braking therefore
always lies among the velocities that all three limits and (I) allow; these form an interval, and any wish is
clipped into it. Its end from (I) is the largest v' with v' h + v'^2/(2a) <= upper - q: `_reach` below.

A joint that starts outside a position limit may stay or move inwards, never further out. A step longer than
`max_gap_s` counts as one of `max_gap_s` from rest: the arm has meanwhile come to its last command. An
infinite acceleration or velocity limit is no limit; with both, a joint is a switch and follows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.robot.limits import Limits

FloatArray = NDArray[np.float64]

INTERVENTION = 1e-3  # a command this far from what was asked counts as limited (1 mrad; 0.1 % of a gripper)


class Guard:
    """Follows targets within limits. Arrays may have leading axes: many independent guards stepped at once.

    `groups` gives each joint a label. Joints of one label brake in proportion, so that they stop on the line
    on which they move; with `keep_direction` they are also limited in proportion. Otherwise, and between
    labels, limiting one joint does not slow another.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        max_gap_s: float = 0.05,
        groups: Sequence[str] | None = None,
        keep_direction: bool = False,
    ) -> None:
        if not (np.isfinite(limits.lower).all() and np.isfinite(limits.upper).all()):
            raise ValueError("a joint without position limits cannot be guarded")
        if groups is not None and len(groups) != len(limits):
            raise ValueError(f"{len(groups)} groups for {len(limits)} joints")
        self.limits = limits
        self.max_gap_s = max_gap_s
        self.keep_direction = keep_direction
        labels = list(groups) if groups is not None else list(limits.names)
        self._groups = [
            [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)
        ]
        self._position: FloatArray | None = None
        self._velocity: FloatArray = np.zeros(len(limits))  # taken from the rounded commands
        self.interventions: NDArray[np.int64] = np.zeros(len(limits), dtype=np.int64)
        self.limited: NDArray[np.bool_] = np.zeros(len(limits), dtype=np.bool_)

    def start(self, position: FloatArray, velocity: FloatArray | None = None) -> None:
        """Begin at this pose, at rest unless a recorded state is restored."""
        start = np.array(position, dtype=np.float64)
        if start.shape[-1:] != (len(self.limits),) or not np.isfinite(start).all():
            raise ValueError(f"cannot start from a pose of shape {start.shape} with values {start}")
        self._position = start
        self._velocity = np.zeros_like(start) if velocity is None else np.array(velocity, dtype=np.float64)
        if self.interventions.shape != start.shape:
            self.interventions = np.zeros(start.shape, dtype=np.int64)
        self.limited = np.zeros(start.shape, dtype=np.bool_)

    def place(self, joints: NDArray[np.bool_], position: FloatArray) -> None:
        """Have these joints, which are not commanded, at this position within their limits, at rest."""
        if not np.isfinite(position[joints]).all():
            raise ValueError(f"cannot begin at {position[joints]}")
        lower = np.minimum(self.limits.lower, self.position)
        upper = np.maximum(self.limits.upper, self.position)
        inside = np.minimum(np.maximum(position, lower), upper)
        self._position = np.where(joints, inside, self.position)
        self._velocity = np.where(joints, 0.0, self._velocity)

    def release(self) -> None:
        """Forget the pose: nothing is commanded any more, and the next motion needs a new start."""
        self._position = None
        self._velocity = np.zeros(len(self.limits))

    @property
    def started(self) -> bool:
        return self._position is not None

    @property
    def position(self) -> FloatArray:
        """The newest command."""
        if self._position is None:
            raise ValueError("the guard was not started: it knows no pose")
        return self._position

    @property
    def velocity(self) -> FloatArray:
        """Velocity over the newest interval, per second."""
        return self._velocity

    @property
    def at_rest(self) -> bool:
        return not self._velocity.any()

    def step(
        self, target: FloatArray, dt_s: float, *, velocity: FloatArray | None = None, speed: float = 1.0
    ) -> FloatArray:
        """The next command towards `target`, `dt_s` after the one before.

        `velocity` is how fast the target itself moves (so that following it costs no lag); `speed` lowers
        the velocity asked for, as a share of the limit. A target that is not finite is none: all brake.
        """
        position, dt = self._open_step(dt_s)
        towards = np.zeros_like(position) if velocity is None else velocity
        usable = np.isfinite(target).all(-1, keepdims=True) & np.isfinite(towards).all(-1, keepdims=True)
        all_usable = bool(usable.all())
        if not all_usable:
            target = np.where(usable, target, position)
            towards = np.where(usable, towards, 0.0)
        limits = self.limits
        lower, upper = np.minimum(limits.lower, position), np.maximum(limits.upper, position)
        inside = np.minimum(np.maximum(target, lower), upper)
        fastest = np.minimum(limits.velocity, (limits.upper - limits.lower) / dt)
        pace = np.where(inside == target, np.minimum(np.maximum(towards, -fastest), fastest), 0.0)
        # Close the lag so as to come to rest exactly there, seen from the moving target.
        lag = inside - position - pace * dt
        rate = self._rate(np.abs(lag), dt)
        wish = pace + lag * (self._least(rate) if self.keep_direction else rate)
        ceiling = speed * limits.velocity
        if self.keep_direction:
            wish = wish * self._least(1.0 / np.maximum(np.abs(wish) / ceiling, 1.0))
        wish = np.minimum(np.maximum(wish, -ceiling), ceiling)
        if not all_usable:
            wish = np.where(usable, wish, self._braked(dt))
        low, high = self._allowed(position, dt)
        if self.keep_direction:
            wish = self._in_proportion(wish, self._braked(dt), low, high)
        self._close_step(position, np.minimum(np.maximum(wish, low), high), dt)
        self.limited = np.abs(self.position - target) > INTERVENTION
        if speed >= 1.0:
            self.interventions = self.interventions + self.limited
        return self.position

    def brake(self, dt_s: float) -> FloatArray:
        """The next command of a stop: each group slows down along its direction, as fast as it may."""
        position, dt = self._open_step(dt_s)
        low, high = self._allowed(position, dt)
        self._close_step(position, np.minimum(np.maximum(self._braked(dt), low), high), dt)
        self.limited = np.zeros(position.shape, dtype=np.bool_)
        return self.position

    def _open_step(self, dt_s: float) -> tuple[FloatArray, float]:
        if not 0.0 < dt_s < np.inf:
            raise ValueError(f"time between two commands must be above zero, not {dt_s}")
        if dt_s > self.max_gap_s:
            self._velocity = np.zeros_like(self._velocity)
            dt_s = self.max_gap_s
        return self.position, dt_s

    def _close_step(self, before: FloatArray, velocity: FloatArray, dt: float) -> None:
        after = before + velocity * dt
        # Only rounding is left to clip here.
        after = np.maximum(after, np.minimum(self.limits.lower, before))
        after = np.minimum(after, np.maximum(self.limits.upper, before))
        self._velocity = (after - before) / dt
        self._position = after

    def _allowed(self, position: FloatArray, dt: float) -> tuple[FloatArray, FloatArray]:
        limits, change = self.limits, self.limits.acceleration * dt
        down = self._reach(np.maximum(position - limits.lower, 0.0), dt)
        up = self._reach(np.maximum(limits.upper - position, 0.0), dt)
        low = np.maximum(self._velocity - change, -np.minimum(limits.velocity, down))
        high = np.minimum(self._velocity + change, np.minimum(limits.velocity, up))
        return low, high

    def _rate(self, distance: FloatArray, dt: float) -> FloatArray:
        """v / distance for the largest v with v dt + v^2/(2a) <= distance; exact for an infinite a too."""
        rate: FloatArray = 2.0 / (dt + np.sqrt(dt * dt + 2.0 * distance / self.limits.acceleration))
        return rate

    def _reach(self, distance: FloatArray, dt: float) -> FloatArray:
        speed: FloatArray = distance * self._rate(distance, dt)
        return speed

    def _braked(self, dt: float) -> FloatArray:
        # The slowest of a group sets the pace of all.
        time_to_rest = -self._least(-np.abs(self._velocity) / self.limits.acceleration)
        used = np.divide(dt, time_to_rest, out=np.ones_like(time_to_rest), where=time_to_rest > dt)
        return self._velocity * (1.0 - used)

    def _in_proportion(
        self, wish: FloatArray, braked: FloatArray, low: FloatArray, high: FloatArray
    ) -> FloatArray:
        """From braking towards the wish, as far for a whole group as its most limited joint may go."""
        base = np.minimum(np.maximum(braked, low), high)
        way = wish - base
        room = np.maximum(np.where(way > 0, high - base, base - low), 0.0)
        needed = np.abs(way)
        share = np.divide(room, needed, out=np.ones_like(needed), where=needed > room)
        moved: FloatArray = base + self._least(share) * way
        return moved

    def _least(self, values: FloatArray) -> FloatArray:
        """For each joint the least value in its group."""
        least = values.copy()
        for members in self._groups:
            if len(members) > 1:
                least[..., members] = least[..., members].min(-1, keepdims=True)
        return least
