"""Two clocks: the robot's, which may be a simulator's and may jump, and a monotonic one beside it."""

from __future__ import annotations

from dataclasses import dataclass

from kuavo_smolvla_ros.control.chunk import NS_PER_S
from kuavo_smolvla_ros.control.reasons import StopReason


@dataclass(frozen=True)
class Tick:
    """Time for the guard to move by (zero: not enough has passed for a step), and what is wrong with it."""

    dt_s: float
    fault: StopReason | None = None
    detail: str = ""


class ClockWatch:
    """Turns pairs of clock readings into steps; names a jump of the first clock and a gap in the second.

    A simulator may run `max_time_factor` times as fast as the wall. Beyond that plus `tolerance_s` the
    robot's clock has jumped: its stamps mean nothing to a plan made before.
    """

    def __init__(self, period_s: float, max_time_factor: float, tolerance_s: float, max_gap_s: float) -> None:
        self._period_s = period_s
        self._max_time_factor = max_time_factor
        self._tolerance_s = tolerance_s
        self._max_gap_s = max_gap_s
        self.seen: tuple[int, int] | None = None
        self.stepped_ns: int | None = None

    def tick(self, ros_ns: int, mono_ns: int) -> Tick:
        """Take both readings of one control period."""
        if self.seen is None or self.stepped_ns is None:
            self.seen, self.stepped_ns = (ros_ns, mono_ns), ros_ns
            return Tick(0.0)
        ros_s = (ros_ns - self.seen[0]) / NS_PER_S
        mono_s = (mono_ns - self.seen[1]) / NS_PER_S
        self.seen = (ros_ns, mono_ns)
        if ros_s < 0.0 or ros_s > mono_s * self._max_time_factor + self._tolerance_s:
            self.stepped_ns = ros_ns
            detail = f"the clock moved by {ros_s:+.3f} s within {mono_s:.3f} s"
            return Tick(self._period_s, StopReason.CLOCK_JUMP, detail)
        dt_s = (ros_ns - self.stepped_ns) / NS_PER_S
        if dt_s < 0.1 * self._period_s:
            dt_s = 0.0  # a stalled clock, or a burst of late timer calls: wait until time has gathered
        else:
            self.stepped_ns = ros_ns
        if mono_s > self._max_gap_s:
            return Tick(dt_s, StopReason.CONTROL_GAP, f"no control for {mono_s:.3f} s")
        return Tick(dt_s)
