"""Reads what the flight recorder wrote, runs the executor on it again, and tells what happened.

Needs neither ROS nor the robot's description: all that a decision depends on is in the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros import __version__
from kuavo_smolvla_ros.control.serial import (
    Plain,
    decision_to_plain,
    first_difference,
    inputs_from_plain,
    restore,
)
from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.flight_file import DECISION, INPUTS, MEMORY, RECORD, VERSION

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Flight:
    """A memory to begin with, and every control period from there to the stop."""

    about: Mapping[str, str]
    memory: Plain
    inputs: tuple[Plain, ...]
    decisions: tuple[Plain, ...]

    @property
    def seconds(self) -> float:
        return self.time_s(0) * -1.0

    def time_s(self, period: int) -> float:
        """When that was, before the stop (0) by the monotonic clock."""
        return float(self.inputs[period]["mono_ns"] - self.inputs[-1]["mono_ns"]) / NS_PER_S


@dataclass(frozen=True)
class Difference:
    """Where a replay first decided otherwise."""

    period: int
    time_s: float
    sentence: str


@dataclass(frozen=True)
class Event:
    """Something that happened, seconds before the stop."""

    time_s: float
    kind: str
    text: str


@dataclass
class Story:
    """What a flight tells."""

    events: list[Event] = field(default_factory=list)
    accepted: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    limited: dict[str, int] = field(default_factory=dict)
    """Periods in which a joint's command was kept away from what the plan asked for, by joint."""
    longest_period_s: float = 0.0


def read_flight(path: Path) -> Flight:
    """The whole recording; one that lacks something would replay as something that never happened."""
    parts: dict[str, list[tuple[int, bytes]]] = {MEMORY: [], INPUTS: [], DECISION: []}
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name one of the files in it")
    with open_bag(path) as bag:
        for message in bag.messages(parts):
            parts[message.topic].append((message.receive_ns, bytes(message.data)))
        metadata = bag.metadata
        damages = bag.damages
    about = {k.removeprefix(f"{RECORD}."): v for k, v in metadata.items() if k.startswith(f"{RECORD}.")}
    if damages:
        raise UserError(
            f"{path}: {damages[0].sentence}; "
            "a flight is replayed whole or not at all, copy it from the robot again"
        )
    if not about:
        raise UserError(f"{path}: is no flight recording (outputs/flight/*.mcap of an executor are)")
    if about.get("version") != VERSION:
        raise UserError(f"{path}: is of version {about.get('version')}, this program reads {VERSION}")
    if not parts[MEMORY] or not parts[INPUTS] or len(parts[INPUTS]) != len(parts[DECISION]):
        raise UserError(f"{path}: its periods are not complete")
    inputs, decisions = ([json.loads(data) for _, data in parts[topic]] for topic in (INPUTS, DECISION))
    return Flight(about, json.loads(parts[MEMORY][0][1]), tuple(inputs), tuple(decisions))


def replay(flight: Flight) -> Difference | None:
    """Step an executor through it; the first decision that is another one, or None."""
    try:
        executor = restore(flight.memory)
        inputs = [inputs_from_plain(plain) for plain in flight.inputs]
    except (KeyError, TypeError) as error:
        recorder = flight.about.get("software")
        raise UserError(
            f"software {recorder} recorded it, and this is {__version__}, which misses {error} in it; "
            "replay it with the software that recorded it"
        ) from error
    for period, (given, recorded) in enumerate(zip(inputs, flight.decisions, strict=True)):
        decision = executor.step(given)
        replayed = json.loads(json.dumps(decision_to_plain(decision)))
        if recorded != replayed:
            names = executor.settings.names
            return Difference(period, flight.time_s(period), _in_words(recorded, replayed, names))
    return None


def _in_words(recorded: Plain, replayed: Plain, names: tuple[str, ...]) -> str:
    difference = first_difference(recorded, replayed) or f"recorded {recorded}, replayed {replayed}"
    before, after = recorded.get("command"), replayed.get("command")
    if not difference.startswith("command:") or before is None or after is None:
        return difference
    joint, a, b = next((n, a, b) for n, a, b in zip(names, before, after, strict=True) if a != b)
    return f"command of {joint}: recorded {a}, replayed {b}"


def tell(flight: Flight) -> Story:
    """What happened, from the recorded decisions."""
    story = Story()
    before: tuple[Any, ...] = ()
    for period, (given, decided) in enumerate(zip(flight.inputs, flight.decisions, strict=True)):
        time_s = flight.time_s(period)
        if period:
            story.longest_period_s = max(story.longest_period_s, time_s - flight.time_s(period - 1))
        for request in given["requests"]:
            story.events.append(Event(time_s, "request", request))
        if decided["answer"] is not None:
            verdict = "accepted" if decided["answer"]["accepted"] else "refused"
            story.events.append(Event(time_s, "answer", f"{verdict}: {decided['answer']['detail']}"))
        story.accepted += len(decided["accepted"])
        for refusal in decided["refused"]:
            story.refusals[refusal["reason"]] += 1
            story.events.append(Event(time_s, "refused", f"{refusal['reason']}: {refusal['detail']}"))
        now = (decided["state"], decided["reason"], decided["task"])
        if now != before:
            before = now
            story.events.append(Event(time_s, "state", _situation(decided)))
        for joint in decided["limited"]:
            story.limited[joint] = story.limited.get(joint, 0) + 1
    return story


def _situation(decided: Plain) -> str:
    text = decided["state"]
    if decided["reason"] is not None:
        text += f" ({decided['reason']})"
    if decided["task"] is not None:
        text += f" {decided['task']}"
    return f"{text}: {decided['detail']}" if decided["detail"] else text
