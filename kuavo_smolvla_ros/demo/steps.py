"""The demo's steps in their order. A new one is added to `road` here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.demo.check import CheckStep
from kuavo_smolvla_ros.demo.convert import ConvertStep
from kuavo_smolvla_ros.demo.drive import DriveStep
from kuavo_smolvla_ros.demo.evaluate import EvaluateStep
from kuavo_smolvla_ros.demo.judge import JudgeStep
from kuavo_smolvla_ros.demo.page import render
from kuavo_smolvla_ros.demo.record import RecordStep
from kuavo_smolvla_ros.demo.road import SUMMARY, Note, Road, Say, Step
from kuavo_smolvla_ros.demo.train import TrainStep

PAGE = "report.html"


def steps(tasks: Sequence[int] = (1, 2, 3, 4), episodes: int = 2, **recording: Any) -> list[Step]:
    """The road for these tasks; what else is given decides how is recorded (`RecordStep`).

    Each task's replay is of those before it, so only the first few of the curriculum can be trained on.
    """
    road: list[Step] = [
        CheckStep(),
        RecordStep(tuple(tasks), episodes, **recording),
        ConvertStep(),
        JudgeStep(),
    ]
    trainable = tuple(tasks) == tuple(range(1, len(tasks) + 1)) and episodes > 1  # one is held out
    return [*road, TrainStep(), EvaluateStep(), DriveStep()] if trainable else road


def walk(root: Path, chosen: Sequence[Step], say: Say = print) -> list[Note]:
    """Walk the steps; page and summary are written anew after each."""

    def tell(notes: list[Note]) -> None:
        seconds = round(sum(note.seconds for note in notes), 3)
        summary = {
            "complete": len(notes) == len(chosen),
            "seconds": seconds,
            "steps": {
                note.name: {"seconds": note.seconds, "commands": note.commands, **note.figures}
                for note in notes
            },
        }
        part = root / f"{SUMMARY}.part"
        part.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        part.replace(root / SUMMARY)
        (root / PAGE).write_text(render(notes, len(chosen)))

    return Road(root, chosen, say, tell).walk()
