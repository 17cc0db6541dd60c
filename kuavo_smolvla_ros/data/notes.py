"""Findings about one recording: its name, the topic of a stream and the time in it are filled in here."""

from __future__ import annotations

from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.robot.description import RobotSpec

NS_PER_S = 1_000_000_000


class Notes:
    """What was found so far. Times are told in seconds from `origin_ns` on."""

    def __init__(self, spec: RobotSpec, name: str) -> None:
        self._spec = spec
        self.name = name
        self.origin_ns = 0
        self.findings: list[Finding] = []

    def add(
        self,
        code: Code,
        severity: Severity,
        sentence: str,
        stream: str | None,
        time_ns: int | None,
        count: int = 1,
    ) -> None:
        self.findings.append(self.finding(code, severity, sentence, stream, time_ns, count))

    def finding(
        self,
        code: Code,
        severity: Severity,
        sentence: str,
        stream: str | None,
        time_ns: int | None,
        count: int = 1,
    ) -> Finding:
        topic = self._spec.streams[stream].topic if stream else None
        at_s = None if time_ns is None else (time_ns - self.origin_ns) / NS_PER_S
        return Finding(code, severity, sentence, self.name, topic, time_ns, at_s, count)
