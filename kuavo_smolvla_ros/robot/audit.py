"""What was seen on each stream, held against the description: the table of `kuavo-smolvla check`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import Block, Camera, RobotSpec, Stream
from kuavo_smolvla_ros.robot.images import decode_image
from kuavo_smolvla_ros.robot.messages import NS_PER_S, stamp_ns
from kuavo_smolvla_ros.robot.units import FloatArray
from kuavo_smolvla_ros.robot.vectors import decode_block

PICTURE_EVERY_NS = NS_PER_S  # decoding every picture would take longer than the recording
LOWEST_RATE_SHARE = (
    0.8  # a 30 Hz camera that gives 24 Hz still fills a 10 Hz grid; below that something is wrong
)
NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class StreamReport:
    """One row of the table. Ages are receive time minus stamp; skews are against the newest stream."""

    stream: str
    direction: str
    topic: str
    type: str
    count: int
    rate_hz: float | None
    age_p50_ms: float | None
    age_p99_ms: float | None
    gap_max_ms: float | None
    skew_p99_ms: float | None
    shape: str
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class StreamAudit:
    """Collects one stream's messages; `add` never raises for a bad message, it notes what was bad."""

    spec: RobotSpec
    stream: Stream
    found_type: str | None = None
    expects_messages: bool = True  # not for a command stream of a live robot: there a listener is expected
    stamps_ns: list[int] = field(default_factory=list)
    ages_ns: list[int] = field(default_factory=list)
    shape: str = ""
    faults: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        cameras = [c for c in self.spec.cameras.values() if c.stream == self.stream.name]
        self._camera: Camera | None = cameras[0] if cameras else None
        parts = (self.spec.state, self.spec.action, self.spec.hold_state, self.spec.hold_action)
        self._blocks: list[Block] = [b for part in parts for b in part if b.stream == self.stream.name]
        self._next_picture_ns = 0

    def add(self, receive_ns: int, message: Any) -> None:
        try:
            stamp = stamp_ns(message) if self.stream.stamp == "header" else receive_ns
            if stamp == 0:
                self.faults["the stamp is zero: the publisher does not fill it in"] += 1
                return
            if self.stamps_ns and stamp < self.stamps_ns[-1]:
                self.faults["stamps run backwards"] += 1
            self.stamps_ns.append(stamp)
            self.ages_ns.append(receive_ns - stamp)
            self._look_inside(stamp, message)
        except UserError as error:
            self.faults[str(error)] += 1

    def forget_times(self) -> None:
        """Start measuring rates and gaps anew; faults seen so far stay."""
        self.stamps_ns.clear()
        self.ages_ns.clear()

    def add_fault(self, text: str) -> None:
        """A message that could not even be read."""
        self.faults[text] += 1

    def _look_inside(self, stamp: int, message: Any) -> None:
        if self._camera is not None:
            if stamp >= self._next_picture_ns:
                self._next_picture_ns = stamp + PICTURE_EVERY_NS
                height, width, _ = decode_image(message).shape
                self.shape = f"{width}x{height}"
                if (height, width) != (self._camera.height, self._camera.width):
                    declared = f"{self._camera.width}x{self._camera.height}"
                    self.faults[f"{self._camera.name} is {self.shape}, declared is {declared}"] += 1
            return
        for block in self._blocks:
            self._check_bounds(block, decode_block(block, message))
        self.shape = f"{sum(len(b.joints) for b in self._blocks)} joints"

    def _check_bounds(self, block: Block, values: FloatArray) -> None:
        for name, value in zip(block.joints, values.tolist(), strict=True):
            joint = self.spec.joints[name]
            margin = 0.02 * (
                joint.upper - joint.lower
            )  # a joint pushed against its stop reads a little beyond
            if not joint.lower - margin <= value <= joint.upper + margin:
                self.faults[
                    f"{name} outside {joint.lower:g}..{joint.upper:g} {joint.unit} (unit? order?)"
                ] += 1

    def report(self, skew_ns: FloatArray | None = None) -> StreamReport:
        ages = np.array(self.ages_ns, dtype=np.float64) / NS_PER_MS
        stamps = np.array(self.stamps_ns, dtype=np.float64)
        steps = np.diff(np.sort(stamps)) / NS_PER_MS
        rate = 1000.0 / float(np.mean(steps)) if steps.size and np.mean(steps) > 0 else None
        return StreamReport(
            stream=self.stream.name,
            direction=self.stream.direction,
            topic=self.stream.topic,
            type=self.found_type or "-",
            count=len(self.stamps_ns),
            rate_hz=rate,
            age_p50_ms=float(np.median(ages)) if ages.size else None,
            age_p99_ms=float(np.percentile(ages, 99)) if ages.size else None,
            gap_max_ms=float(np.max(steps)) if steps.size else None,
            skew_p99_ms=None if skew_ns is None else float(np.percentile(skew_ns, 99)) / NS_PER_MS,
            shape=self.shape,
            problems=tuple(self._problems(rate, ages, steps)),
        )

    def _problems(self, rate: float | None, ages: FloatArray, steps: FloatArray) -> list[str]:
        stream = self.stream
        if self.found_type is None and not self.stamps_ns and not self.faults:
            return [f"{'nothing' if self.expects_messages else 'nobody listens'} on {stream.topic}"]
        problems = []
        if self.found_type not in (None, stream.type):
            problems.append(f"type is {self.found_type}, declared is {stream.type}")
        problems += [f"{text} ({count}x)" for text, count in self.faults.most_common()]
        if not self.stamps_ns:
            return problems or ([f"no message on {stream.topic}"] if self.expects_messages else [])
        if ages.size and float(np.min(ages)) < -20.0:
            problems.append(f"stamps up to {-float(np.min(ages)):.0f} ms in the future: the clocks disagree")
        if stream.direction == "in":
            limit_ms = stream.max_age_s * 1000
            if rate is not None and rate < LOWEST_RATE_SHARE * stream.rate_hz:
                problems.append(f"rate is {rate:.1f} Hz, declared is {stream.rate_hz:g} Hz")
            if ages.size and float(np.percentile(ages, 99)) > limit_ms:
                problems.append(f"1 % of the messages are older than {limit_ms:.0f} ms on arrival")
            if steps.size and float(np.max(steps)) > limit_ms:
                problems.append(f"a gap of {float(np.max(steps)):.0f} ms, allowed is {limit_ms:.0f} ms")
        return problems


def skews(audits: Mapping[str, StreamAudit], fps: float) -> dict[str, FloatArray]:
    """Per incoming stream, how far it lags behind the newest stream at each step of the grid (ns)."""
    inputs = {n: np.sort(np.array(a.stamps_ns)) for n, a in audits.items() if a.stream.direction == "in"}
    if not inputs or any(s.size == 0 for s in inputs.values()):
        return {}
    start, stop = max(s[0] for s in inputs.values()), min(s[-1] for s in inputs.values())
    if start > stop:
        return {}
    grid = np.arange(start, stop + 1, int(NS_PER_S / fps))
    newest = {n: s[np.searchsorted(s, grid, side="right") - 1] for n, s in inputs.items()}
    latest = np.max(np.stack(list(newest.values())), axis=0) if newest else np.empty(0)
    return {n: (latest - stamps).astype(np.float64) for n, stamps in newest.items()}


def reports(spec: RobotSpec, audits: Mapping[str, StreamAudit]) -> list[StreamReport]:
    """All rows, in the description's order, with skews judged against the description's budget."""
    lags = skews(audits, spec.fps)
    rows = []
    for name, audit in audits.items():
        lag = lags.get(name)
        row = audit.report(lag)
        limit_ms = spec.max_skew_s * 1000
        if row.skew_p99_ms is not None and row.skew_p99_ms > limit_ms:
            text = (
                f"lags {row.skew_p99_ms:.0f} ms behind the newest stream (p99), allowed is {limit_ms:.0f} ms"
            )
            row = dataclasses.replace(row, problems=(*row.problems, text))
        rows.append(row)
    return rows
