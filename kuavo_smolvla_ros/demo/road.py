"""Steps in a row: each leaves a note when it is done, so that the next run goes on after it.

A step is added by writing a class like those in `check.py` or `record.py` and naming it in `steps.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kuavo_smolvla_ros import __version__

NOTES = "steps"
SUMMARY = "summary.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where a step works, and how it tells what it is doing."""

    root: Path
    say: Say = print
    # What the steps before have told, by their names.
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Step(Protocol):
    """One part of the road."""

    name: str  # for its note, and for who asks for this step
    title: str  # what it does, in a few words

    def settings(self) -> Mapping[str, Any]:
        """What its result depends on, besides the steps before; as JSON."""
        ...

    def commands(self, place: Place) -> Sequence[str]:
        """How to do the same by hand."""
        ...

    def run(self, place: Place) -> dict[str, Any]:
        """Do it, and tell the figures; called again after an interruption, it goes on where it was."""
        ...


@dataclass(frozen=True)
class Note:
    """That a step is done, and what it told."""

    name: str
    title: str
    fingerprint: str
    seconds: float  # over all runs that had a part in it
    commands: tuple[str, ...]
    figures: Mapping[str, Any]


class Road:
    """Walks the steps, skipping what is done; `after` is called with all notes after each step."""

    def __init__(
        self, root: Path, steps: Sequence[Step], say: Say = print, after: Callable[[list[Note]], None] = len
    ) -> None:
        self.root = root
        self._steps = steps
        self._say = say
        self._after = after

    def walk(self) -> list[Note]:
        """All steps in their order; what one of them raises ends the walk."""
        notes: list[Note] = []
        fingerprint = __version__
        for number, step in enumerate(self._steps, 1):
            fingerprint = _fingerprint(fingerprint, step)
            head = f"[{number}/{len(self._steps)}] {step.title}"
            note = self._read(step, fingerprint)
            if note is None:
                self._say(head)
                note = self._do(step, fingerprint, {n.name: n.figures for n in notes})
                self._say(f"    done in {note.seconds:.0f} s")
            else:
                self._say(f"{head}: done already")
            notes.append(note)
            self._after(notes)
        return notes

    def _do(self, step: Step, fingerprint: str, told: Mapping[str, Mapping[str, Any]]) -> Note:
        place = Place(self.root, lambda text: self._say(f"    {text}"), told)
        begun = self.root / NOTES / f"{step.name}.begun.json"
        spent = _spent(begun, fingerprint)
        start = time.monotonic()
        try:
            figures = step.run(place)
        except BaseException:
            seconds = spent + time.monotonic() - start
            _write(begun, {"fingerprint": fingerprint, "seconds": round(seconds, 3)})
            raise
        seconds = round(spent + time.monotonic() - start, 3)
        commands = tuple(step.commands(place))
        note = Note(step.name, step.title, fingerprint, seconds, commands, figures)
        _write(self.root / NOTES / f"{step.name}.json", note.__dict__)
        begun.unlink(missing_ok=True)
        return note

    def _read(self, step: Step, fingerprint: str) -> Note | None:
        path = self.root / NOTES / f"{step.name}.json"
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        if content["fingerprint"] != fingerprint:
            return None
        return Note(**{**content, "commands": tuple(content["commands"])})


def _fingerprint(before: str, step: Step) -> str:
    """A step is to be done again when it, or any before it, is another than it was."""
    content = json.dumps([before, step.name, dict(step.settings())], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _spent(begun: Path, fingerprint: str) -> float:
    """Seconds that interrupted runs of the same step took."""
    if not begun.is_file():
        return 0.0
    content = json.loads(begun.read_text())
    return float(content["seconds"]) if content["fingerprint"] == fingerprint else 0.0


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(part, path)
