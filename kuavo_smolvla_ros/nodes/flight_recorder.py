"""Keeps the last seconds of control in memory and writes them to a file at every stop, for a replay.

The control loop only keeps references to what it had in its hands anyway. A thread turns them into a file, in
slices: it works for some milliseconds after each control period and rests before the next, because whoever
computes in Python holds the interpreter, and the next command must not wait for it. For the same reason the
thread keeps the priority of the control loop: less urgent, it could be put aside by other programs while it
holds the interpreter.
"""

from __future__ import annotations

import math
import os
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.reasons import State, StopReason
from kuavo_smolvla_ros.control.records import Decision, Inputs
from kuavo_smolvla_ros.control.serial import capture
from kuavo_smolvla_ros.nodes.flight_file import Period, write

MEMORY_EVERY_NS = 1_000_000_000
SLICE_S = 0.003  # of a period of 10 ms, when its own work is done
SPARE_S = 0.002  # before the next period; the longest piece of a slice takes about one millisecond
NO_PERIOD_S = 0.1  # without a period for so long, nobody is waiting
WAITING = 4  # stops that may wait for their file; each keeps its seconds in memory
NS_PER_S = 1_000_000_000
MB = 1_000_000


@dataclass(frozen=True)
class FlightSettings:
    """Where flights go, and how many and how long they are."""

    folder: Path
    seconds: float = 30.0
    keep: int = 50
    min_free_mb: float = 500.0


@dataclass(frozen=True)
class _Flight:
    reason: StopReason
    detail: str
    ended: datetime
    wall_offset_ns: int
    periods: list[Period]


class FlightRecorder:
    """Steps the executor, remembers what went in and came out, and saves it when the arms come to a stop."""

    def __init__(self, settings: FlightSettings, rate_hz: float, about: Mapping[str, str]) -> None:
        self.last_file: Path | None = None
        self._settings = settings
        self._about = dict(about)
        # A replay begins at a memory, of which there is one a second.
        self._ring: deque[Period] = deque(maxlen=math.ceil((settings.seconds + 1.0) * rate_hz))
        self._memory_every = math.ceil(rate_hz)
        self._memory_ns: int | None = None
        self._since_memory = 0
        self._held: StopReason | None = None
        self._moved = False
        self._told: deque[str] = deque(maxlen=100)
        self._flights: queue.Queue[_Flight | None] = queue.Queue(WAITING)
        self._pause = threading.Event()
        self._until_s = 0.0
        self._hurry = self._abandon = False
        self._thread = threading.Thread(target=self._work, name="flight_recorder", daemon=True)
        self._thread.start()

    # --- In the control loop

    def step(self, executor: Executor, inputs: Inputs) -> Decision:
        """One period of the executor, remembered."""
        memory = None
        if self._is_memory_due(inputs.mono_ns):
            self._memory_ns, self._since_memory = inputs.mono_ns, 0
            memory = capture(executor)
        self._since_memory += 1
        decision = executor.step(inputs)
        self._ring.append(Period(inputs, decision, memory))
        self._look_for_stop(decision, executor.latched)
        return decision

    def _is_memory_due(self, mono_ns: int) -> bool:
        """Once a second; and once in as many periods, for requests are answered in periods of their own."""
        if self._memory_ns is None or self._since_memory >= self._memory_every:
            return True
        return mono_ns - self._memory_ns >= MEMORY_EVERY_NS

    def period_done(self, left_s: float) -> None:
        """The loop has nothing to do until its next period in `left_s`: the file may be written meanwhile."""
        free_s = min(SLICE_S, left_s - SPARE_S)
        if free_s > 0.0:
            self._until_s = time.monotonic() + free_s
            self._pause.set()

    def _look_for_stop(self, decision: Decision, latched: bool) -> None:
        """A stop begins a hold that only a request ends; a more urgent reason during one is another stop."""
        if decision.state in (State.RAMPING, State.FOLLOWING):
            self._moved = True
        holds = decision.reason if decision.state is State.HOLDING and latched else None
        # The end of a program whose arms were at rest is no stop.
        is_stop = holds not in (None, self._held) and (holds is not StopReason.SHUTDOWN or self._moved)
        self._held = holds
        if holds is not None:
            if is_stop:
                self._save(holds, decision.detail)
            self._moved = False

    def _save(self, reason: StopReason, detail: str) -> None:
        periods = list(self._ring)
        first = next(i for i, period in enumerate(periods) if period.memory is not None)
        offset_ns = time.time_ns() - time.monotonic_ns()
        flight = _Flight(reason, detail, datetime.now(timezone.utc), offset_ns, periods[first:])
        try:
            self._flights.put_nowait(flight)
        except queue.Full:
            self._told.append(f"the stop '{reason.value}' is not recorded: {WAITING} others still wait")

    def outcomes(self) -> list[str]:
        """What became of the flights since this was last asked, in sentences."""
        return [self._told.popleft() for _ in range(len(self._told))]

    def close(self, timeout_s: float) -> None:
        """Write what is waiting, without rests; what takes longer than this is given up."""
        self._hurry = True
        self._pause.set()
        deadline = time.monotonic() + timeout_s
        with suppress(queue.Full):
            self._flights.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._abandon = True
        self._thread.join(NO_PERIOD_S)

    # --- In the thread

    def _work(self) -> None:
        while not self._abandon and (flight := self._flights.get()) is not None:
            try:
                self._told.append(self._write(flight))
            except OSError as error:
                self._told.append(
                    f"the stop '{flight.reason.value}' could not be recorded: {error}; "
                    "set flight_folder to one that can be written to"
                )

    def _write(self, flight: _Flight) -> str:
        folder = self._settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        free_mb = shutil.disk_usage(folder).free / MB
        if free_mb < self._settings.min_free_mb:
            return (
                f"the stop '{flight.reason.value}' is not recorded: {free_mb:.0f} MB are free on the disk of "
                f"{folder}, {self._settings.min_free_mb:.0f} must stay free (flight_min_free_mb)"
            )
        path = folder / f"flight_{flight.ended:%Y%m%dT%H%M%S.%f}Z_{flight.reason.value}.mcap"
        part = folder / f".{path.name}.{os.getpid()}.part"
        try:
            if not self._write_in_slices(part, flight):
                return f"the stop '{flight.reason.value}' is not recorded: the executor ended before"
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(folder.glob("flight_*Z_*.mcap"))[: -self._settings.keep]:
            old.unlink(missing_ok=True)
        self.last_file = path
        return f"the stop '{flight.reason.value}' is recorded in {path} (kuavo-smolvla replay {path})"

    def _write_in_slices(self, part: Path, flight: _Flight) -> bool:
        about = {
            **self._about,
            "reason": flight.reason.value,
            "detail": flight.detail,
            "ended": flight.ended.isoformat(timespec="milliseconds"),
        }
        for _ in write(part, flight.periods, about, flight.wall_offset_ns):
            if self._abandon:
                return False
            if not self._hurry and time.monotonic() >= self._until_s:
                self._pause.clear()
                if not self._pause.wait(NO_PERIOD_S):
                    self._until_s = time.monotonic() + SLICE_S
        return True
