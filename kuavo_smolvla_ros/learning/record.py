"""What the stages below a folder left behind, gathered for reports from their files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.learning.metrics import Scores, score_matrix, summarise
from kuavo_smolvla_ros.learning.outputs import LOG_FILE, RESULTS_FILE, Row, read_rows
from kuavo_smolvla_ros.policy.checkpoint import read_json

STAGE_FILE = "stage.json"
SUCCESS_FILE = "success.json"


@dataclass(frozen=True)
class StageRecord:
    """One stage: its settings, its log, and its results once it is finished."""

    folder: Path
    stage: dict[str, Any]
    rows: list[Row]
    results: dict[str, Any] | None
    success: dict[str, Any]  # by task number: successes, trials, interval; of those that were evaluated

    @property
    def name(self) -> str:
        return self.stage["name"]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """All tasks seen so far, the own one last."""
        return self.stage["tasks"]

    @property
    def number(self) -> str:
        return str(self.tasks[-1]["number"])

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    @cached_property
    def begin(self) -> Row:
        """The row that says what the stage is."""
        return self.of_kind("stage")[0]

    @property
    def validations(self) -> list[Row]:
        return self.of_kind("validation")

    @property
    def own_curve(self) -> list[float]:
        """Losses of the own task, from before the first step on."""
        return [row["tasks"][self.number]["loss"] for row in self.validations]

    def throughput(self) -> dict[str, float]:
        """Mean seconds per step by what they were spent on, and the median of samples per second."""
        rows = self.of_kind("train")
        parts = {
            name: sum(r[name] for r in rows) / len(rows) for name in ("data_s", "preprocess_s", "update_s")
        }
        rates = sorted(row["samples_per_s"] for row in rows)
        return {**parts, "samples_per_s": rates[len(rates) // 2]}


def read_stages(root: Path) -> list[StageRecord]:
    """The stages directly below `root` that have begun, in the order of their tasks."""
    records = []
    for file in root.glob(f"*/{STAGE_FILE}"):
        folder = file.parent
        if not (folder / LOG_FILE).is_file():
            continue
        record = StageRecord(
            folder,
            read_json(file)["stage"],
            read_rows(folder),
            read_json(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else None,
            read_json(folder / SUCCESS_FILE)["tasks"] if (folder / SUCCESS_FILE).is_file() else {},
        )
        if record.of_kind("train"):
            records.append(record)
    return sorted(records, key=lambda record: (len(record.tasks), int(record.number)))


def loss_matrix(stages: Sequence[StageRecord]) -> tuple[list[str], Scores]:
    """Task numbers, and the loss of each task (column) after each finished stage (row).

    What a task was worth just before its own stage, measured at that stage's step 0, is entered as well.
    """
    order = [record.number for record in stages]
    rows: dict[str, dict[str, float]] = {number: {} for number in order}
    for place, record in enumerate(stages):
        if record.results is not None:
            rows[record.number].update(record.results["best_validation"])
        if place and record.validations:
            rows[order[place - 1]].setdefault(record.number, record.own_curve[0])
    return order, score_matrix(rows, order)


def success_entry(
    stages: Sequence[StageRecord], joint: Sequence[StageRecord], single: Sequence[StageRecord]
) -> dict[str, Any] | None:
    """The matrix of success in simulation, as far as it was evaluated; figures where nothing is missing."""
    order = [record.number for record in stages]
    rows = {r.number: {n: entry["success"] for n, entry in r.success.items()} for r in stages}
    if not any(rows.values()):
        return None
    matrix = score_matrix(rows, order)
    by_joint = {n: entry["success"] for r in joint for n, entry in r.success.items()}
    by_single = {r.number: r.success[r.number]["success"] for r in single if r.number in r.success}
    complete = all(math.isfinite(matrix[i][j]) for i in range(len(order)) for j in range(i + 1))
    summary = (
        summarise(
            matrix,
            joint=[by_joint[n] for n in order] if all(n in by_joint for n in order) else None,
            single=[by_single[n] for n in order] if all(n in by_single for n in order) else None,
        )
        if complete
        else None
    )
    cells = [[record.success.get(n) for n in order] for record in stages]
    return {
        "tasks": order,
        "success": _with_none(matrix),
        "trials": [[None if c is None else c["trials"] for c in row] for row in cells],
        "interval_95": [[None if c is None else c["interval_95"] for c in row] for row in cells],
        "figures": None if summary is None else summary.to_json(),
    }


def _with_none(matrix: Scores) -> list[list[float | None]]:
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


def forgetting(root: Path) -> dict[str, Any]:
    """The matrix and its figures, for the curriculum and for each reference that was run."""
    stages = [record for record in read_stages(root) if record.results is not None]
    joint = [r for r in read_stages(root / "references" / "joint") if r.results is not None]
    single = [r for r in read_stages(root / "references" / "single") if r.results is not None]
    bare = [r for r in read_stages(root / "references" / "no_replay") if r.results is not None]
    # Their first stage is the curriculum's own work, and is not done twice.
    bare, single = (
        [*stages[:1], *found] if found and _lacks(found, stages) else found for found in (bare, single)
    )
    content: dict[str, Any] = {"curriculum": _entry(stages, joint, single)} if stages else {}
    if bare:
        content["no_replay"] = _entry(bare, joint, single)
    if joint:
        content["joint"] = {"loss": joint[0].results["best_validation"]}  # type: ignore[index]
    if single:
        content["single"] = {"loss": {r.number: r.results["best_loss"] for r in single}}  # type: ignore[index]
    return content


def _lacks(found: Sequence[StageRecord], stages: Sequence[StageRecord]) -> bool:
    return bool(stages) and all(record.number != stages[0].number for record in found)


def _entry(
    stages: Sequence[StageRecord], joint: Sequence[StageRecord], single: Sequence[StageRecord]
) -> dict[str, Any]:
    order, matrix = loss_matrix(stages)
    by_joint = joint[0].results["best_validation"] if joint else {}  # type: ignore[index]
    by_single = {record.number: record.results["best_loss"] for record in single}  # type: ignore[index]
    summary = summarise(
        matrix,
        higher_is_better=False,
        curves=[record.own_curve for record in stages],
        joint=[by_joint[n] for n in order] if all(n in by_joint for n in order) else None,
        single=[by_single[n] for n in order] if all(n in by_single for n in order) else None,
    )
    return {
        "tasks": order,
        "loss": _with_none(matrix),
        "figures": summary.to_json(),
        "success": success_entry(stages, joint, single),
    }
