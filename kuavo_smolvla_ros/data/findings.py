"""What was found in a recording or a dataset: one sentence each, with recording, topic and time.

A finding is a fact, not a verdict; which of them make data unfit is decided by severities, here and in
`config/data/quality.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Severity(str, Enum):
    INFO = "info"  # worth knowing
    WARNING = "warning"  # the data are used; somebody should look
    ERROR = "error"  # data were left out, or should not be trained on

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Code(str, Enum):
    """What kind of finding it is; the value is what files and thresholds call it."""

    # The recording as a file.
    UNREADABLE = "unreadable"
    DAMAGED = "damaged"
    EMPTY = "empty"
    # What it says about itself.
    OTHER_ROBOT = "other_robot"
    NO_TASK = "no_task"
    # Its topics.
    MISSING_TOPIC = "missing_topic"
    WRONG_TYPE = "wrong_type"
    STREAM = "stream"  # figures of one topic
    LOW_RATE = "low_rate"
    BACKLOG = "backlog"
    CLOCK_OFFSET = "clock_offset"
    UNDECODABLE = "undecodable"
    # Time.
    UNSTAMPED = "unstamped"
    ODD_STAMP = "odd_stamp"
    CLOCK_JUMP = "clock_jump"
    GAP = "gap"
    STALE = "stale"
    SKEWED = "skewed"
    FROZEN = "frozen"
    # Content.
    NOT_FINITE = "not_finite"
    BAD_PICTURE = "bad_picture"
    WRONG_SIZE = "wrong_size"
    NO_COMMAND = "no_command"
    # What was made of it.
    PART = "part"
    TRIMMED = "trimmed"
    TOO_SHORT = "too_short"
    DISCARDED = "discarded"
    # Quality of the episodes.
    AT_LIMIT = "at_limit"
    OUT_OF_LIMITS = "out_of_limits"
    FAST = "fast"
    JERKY = "jerky"
    LAG = "lag"
    STATIC = "static"
    DUPLICATE = "duplicate"
    GRIPPER_UNUSED = "gripper_unused"
    FROZEN_PICTURES = "frozen_pictures"
    DARK_PICTURES = "dark_pictures"
    SHIFTED = "shifted"  # against an earlier dataset
    FEW_EPISODES = "few_episodes"


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    code: Code
    severity: Severity
    sentence: str
    bag: str = ""
    topic: str | None = None
    time_ns: int | None = None
    at_s: float | None = None  # since the recording's (or the episode's) beginning
    count: int = 1
    data: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        where = [self.bag] if self.bag else []
        if self.topic:
            where.append(self.topic)
        if self.at_s is not None:
            where.append(f"at {self.at_s:.2f} s")
        often = f" ({self.count} times)" if self.count > 1 else ""
        return f"{' '.join(where)}: {self.sentence}{often}" if where else f"{self.sentence}{often}"

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "code": self.code.value,
            "severity": self.severity.value,
            "sentence": self.sentence,
            "bag": self.bag,
            "topic": self.topic,
            "time_ns": self.time_ns,
            "at_s": None if self.at_s is None else round(self.at_s, 3),
            "count": self.count,
        }
        if self.data is not None:
            entry["data"] = dict(self.data)
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Finding:
        return cls(**{**entry, "code": Code(entry["code"]), "severity": Severity(entry["severity"])})


def worst(findings: Iterable[Finding]) -> Severity | None:
    return max((finding.severity for finding in findings), key=lambda s: s.rank, default=None)
