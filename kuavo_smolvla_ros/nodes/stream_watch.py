"""What there is to say about each incoming stream: how fast, how old, and whether it is alive."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kuavo_smolvla_ros.robot.messages import NS_PER_S
from kuavo_smolvla_ros.robot.timeline import Budget, StreamBuffer

RATE_OVER_NS = 2 * NS_PER_S


@dataclass(frozen=True)
class StreamFigures:
    """One stream at one moment, by the stamps of its messages."""

    received: int
    rate_hz: float | None
    """None until there is enough to measure."""
    age_ns: int | None
    """None while nothing has come."""
    dead: bool
    """Nothing new within its age limit, or a picture that no longer changes."""


class StreamWatch:
    """Looked at now and then, it knows the rates in between."""

    def __init__(self, budgets: Mapping[str, Budget]) -> None:
        self._budgets = budgets
        self._seen: dict[str, deque[tuple[int, int]]] = {name: deque() for name in budgets}

    def look(self, buffers: Mapping[str, StreamBuffer[Any]], now_ns: int) -> dict[str, StreamFigures]:
        return {name: self._figures(buffer, now_ns) for name, buffer in buffers.items()}

    def _figures(self, buffer: StreamBuffer[Any], now_ns: int) -> StreamFigures:
        budget, newest_ns = self._budgets[buffer.name], buffer.newest_ns
        received = sum(buffer.counts.values())
        kept = sum(count for arrival, count in buffer.counts.items() if arrival.kept)
        rate_hz = self._rate(buffer.name, newest_ns, kept)
        if newest_ns is None:
            return StreamFigures(received, rate_hz, None, budget.max_age_ns is not None)
        age_ns = now_ns - newest_ns
        dead = budget.max_age_ns is not None and age_ns > budget.max_age_ns
        if budget.max_frozen_ns is not None:
            newest = buffer.asof(newest_ns)
            assert newest is not None
            dead = dead or newest_ns - newest.unchanged_since_ns > budget.max_frozen_ns
        return StreamFigures(received, rate_hz, age_ns, dead)

    def _rate(self, name: str, newest_ns: int | None, kept: int) -> float | None:
        seen = self._seen[name]
        if newest_ns is None or (seen and newest_ns < seen[-1][0]):  # the clock was set
            seen.clear()
        if newest_ns is None:
            return None
        if not seen or newest_ns > seen[-1][0]:
            seen.append((newest_ns, kept))
        while len(seen) > 2 and seen[-1][0] - seen[1][0] >= RATE_OVER_NS:
            seen.popleft()
        (first_ns, first), (last_ns, last) = seen[0], seen[-1]
        if last_ns == first_ns:
            return None
        return (last - first) * NS_PER_S / (last_ns - first_ns)
