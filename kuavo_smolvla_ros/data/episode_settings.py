"""How episodes are cut from recordings; `extract:` in `config/data/*.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kuavo_smolvla_ros.errors import UsageError


@dataclass(frozen=True)
class EpisodeSettings:
    """The rules by which a recording becomes episodes, is divided, trimmed or left out."""

    # What the recording shows. None: what its recorder wrote into it, without which it is left out.
    task: str | None = None
    instruction: str | None = None

    # Cameras whose picture stays the same for longer than this are dead, as in the policy node. None: not
    # watched.
    max_frozen_s: float | None = 1.0
    # How far apart in time the samples of one observation may lie. None: what the description allows the live
    # robot. A camera that loses one picture of 30 Hz now and then exceeds 50 ms there, which ends an episode
    # each time.
    max_skew_s: float | None = None
    # A time without an observation ends an episode; what follows is another ("split"), or all is left out
    # ("reject").
    on_gap: str = "split"
    # Parts shorter than this are left out.
    min_episode_s: float = 2.0

    # Idle ends are cut off, but for this much. An arm is still while every value of state and action stays
    # within the tolerance (rad, m, or fraction of the gripper) of where it was, and the base is not walking.
    trim_idle: bool = True
    idle_margin_s: float = 1.0
    still_tolerance: float = 0.02
    # A longer standstill in the middle separates two episodes. None: never.
    max_pause_s: float | None = 10.0
    # Texts "start", "stop" and "discard" (std_msgs/String) on this topic bound episodes; without any the
    # whole recording is one. None: not looked for.
    marker_topic: str | None = "/kuavo/episode"

    # Before a joint's first command the action is unknown: that time is cut off ("trim"), or the joint's
    # measured value stands for the command that nobody gave ("measured"; only joints that are in the state).
    uncommanded: str = "trim"
    # Streams whose publisher leaves the stamp empty: their time of receipt is used instead.
    receive_stamped: tuple[str, ...] = ()
    # Messages that reach the recorder later than this (against the fastest of their topic) are worth a
    # warning.
    backlog_s: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in (("on_gap", ("split", "reject")), ("uncommanded", ("trim", "measured"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"extract.{name} is '{getattr(self, name)}'; choose {' or '.join(allowed)}")
        for name in (
            "max_frozen_s",
            "max_skew_s",
            "min_episode_s",
            "still_tolerance",
            "max_pause_s",
            "backlog_s",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"extract.{name} is {value!r}; it must be above 0")
        if not self.idle_margin_s >= 0:
            raise UsageError(f"extract.idle_margin_s is {self.idle_margin_s!r}; it must not be negative")
        for name in ("task", "instruction"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UsageError(f"extract.{name} is empty; leave it out, or say what the recordings show")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> EpisodeSettings:
        known = {f.name: f for f in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise UsageError(f"extract.{key} is unknown; known are {', '.join(known)}")
            _check_kind(key, value, known[key].default)
        chosen = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in given.items()}
        return cls(**chosen)


_OPTIONAL_NUMBERS = ("max_frozen_s", "max_pause_s", "max_skew_s")
_OPTIONAL_TEXTS = ("task", "instruction", "marker_topic")


def _check_kind(key: str, value: Any, default: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if key in _OPTIONAL_NUMBERS:
        good, kind = value is None or is_number, "a number of seconds, or null"
    elif key in _OPTIONAL_TEXTS:
        good, kind = value is None or isinstance(value, str), "a text, or null"
    elif isinstance(default, bool):
        good, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, float):
        good, kind = is_number, "a number"
    elif isinstance(default, tuple):
        good = not isinstance(value, str) and all(isinstance(item, str) for item in value)
        kind = "a list of stream names"
    else:
        good, kind = isinstance(value, str), "a text"
    if not good:
        raise UsageError(f"extract.{key} is {value!r}; it must be {kind}")
