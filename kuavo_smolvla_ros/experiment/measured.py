"""What the trials came to, as data: kept beside the page, so that several machines may do a part each."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.trials import TrialSettings
from kuavo_smolvla_ros.experiment.ways import TrainingSettings
from kuavo_smolvla_ros.policy.checkpoint import read_json, write_json

FIGURES = "results.json"
HELD_OUT, OTHERS, OTHERS_HELD_OUT = "held_out", "others", "others_held_out"
"""Sentences for the same task that no training has seen, the sentences of the other tasks, and sentences for
these that no training has seen.
"""

Tally = Mapping[str, Any]
Cell = tuple[str, int, int]
"""Way, stage (from 0) and task (from 1)."""


@dataclass(frozen=True)
class Conditions:
    """All that figures depend on, beside the code; only what has the same is put on one page."""

    demonstrations: int
    seeing: SeeingSettings
    training: TrainingSettings
    trials: TrialSettings

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return dict(json.loads(json.dumps(asdict(self))))


@dataclass(frozen=True)
class Measured:
    """Tallies by cell, and by what was said in a task's scene instead of its own sentence."""

    cells: dict[Cell, Tally] = field(default_factory=dict)
    spoken: dict[tuple[str, int], Tally] = field(default_factory=dict)

    def over(self, earlier: Measured) -> Measured:
        """Both; where both know the same, this one holds."""
        return Measured({**earlier.cells, **self.cells}, {**earlier.spoken, **self.spoken})

    def write(self, folder: Path, conditions: Conditions) -> None:
        content = {
            "conditions": conditions.plain(),
            "cells": {
                f"{way}/stage{s + 1}/task{t}": told for (way, s, t), told in sorted(self.cells.items())
            },
            "spoken": {f"{what}/task{task}": told for (what, task), told in sorted(self.spoken.items())},
        }
        write_json(folder / FIGURES, content)


def kept(folder: Path, conditions: Conditions) -> tuple[Measured, str | None]:
    """What a folder holds under these conditions; otherwise nothing, and which of them differ."""
    file = folder / FIGURES
    if not file.is_file():
        return Measured(), None
    try:
        told = read_json(file)
        differing = _differing(told["conditions"], conditions.plain())
        if differing:
            return Measured(), f"{file} is of other conditions ({', '.join(differing)}) and is begun anew"
        cells = {_cell(name): tally for name, tally in told["cells"].items()}
        spoken = {_said(name): tally for name, tally in told["spoken"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise UserError(
            f"{file} is not what an experiment wrote ({fault}); delete it or put it back"
        ) from fault
    return Measured(cells, spoken), None


def machine() -> str:
    """What figures are measured on, for those who read them."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} cores"


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], above: str = "") -> list[str]:
    names = []
    for name in sorted(theirs.keys() | ours.keys()):
        mine, yours = ours.get(name), theirs.get(name)
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            names += _differing(yours, mine, f"{above}{name}.")
        elif mine != yours:
            names.append(f"{above}{name}")
    return names


def _cell(name: str) -> Cell:
    way, stage, task = name.split("/")
    return way, int(stage.removeprefix("stage")) - 1, int(task.removeprefix("task"))


def _said(name: str) -> tuple[str, int]:
    what, task = name.split("/")
    return what, int(task.removeprefix("task"))
