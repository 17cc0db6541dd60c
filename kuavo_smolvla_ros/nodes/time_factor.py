"""How fast the robot's clock runs against the wall: 1 on a robot, anything in simulation."""

from __future__ import annotations

from collections import deque

WINDOW_S = 2.0


class TimeFactor:
    """Measured over the last two seconds; 1 until there is something to measure."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque()

    def see(self, ros_ns: int, mono_s: float) -> None:
        """Take both clocks' readings, often."""
        if self._seen and ros_ns < self._seen[-1][0]:
            self._seen.clear()
        self._seen.append((ros_ns, mono_s))
        while mono_s - self._seen[0][1] > WINDOW_S:
            self._seen.popleft()

    def value(self) -> float:
        """Seconds of the robot's clock per second of the wall."""
        if len(self._seen) < 2:
            return 1.0
        (first_ns, first_s), (last_ns, last_s) = self._seen[0], self._seen[-1]
        if last_s - first_s < 0.2:
            return 1.0
        return (last_ns - first_ns) / 1e9 / (last_s - first_s)
