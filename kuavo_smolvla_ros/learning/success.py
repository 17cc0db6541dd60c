"""How often each stage's result does each task in simulation, kept beside the stage for the report.

`success.json` in a stage's folder is one row of the success matrix: all tasks by number, tried with the
stage's `best`. Evaluating further tasks adds to it, evaluating one again replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.metrics import wilson
from kuavo_smolvla_ros.learning.outputs import RESULTS_FILE
from kuavo_smolvla_ros.learning.record import STAGE_FILE, SUCCESS_FILE, read_stages
from kuavo_smolvla_ros.policy.checkpoint import read_json, write_json

BEST = "best"


def checkpoints_of(root: Path) -> list[Path]:
    """The results of a curriculum's finished stages, in their order; empty for any other folder."""
    return [record.folder / BEST for record in read_stages(root) if record.results is not None]


def stage_of(checkpoint: Path) -> Path | None:
    """The folder of the stage whose result a checkpoint is; None for any other checkpoint."""
    folder = checkpoint.parent
    is_result = checkpoint.name == BEST and (folder / STAGE_FILE).is_file()
    return folder if is_result and (folder / RESULTS_FILE).is_file() else None


def tally(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Successes of a task's episodes with their 95 % interval, and the mean score."""
    if not episodes:
        raise UserError("no episode was played, so nothing can be said about success")
    good = sum(bool(episode["success"]) for episode in episodes)
    interval = wilson(good, len(episodes))
    return {
        "successes": good,
        "trials": len(episodes),
        "success": interval.share,
        "interval_95": [interval.low, interval.high],
        "mean_score": sum(episode["score"] for episode in episodes) / len(episodes),
    }


def keep(stage_folder: Path, results: Sequence[Mapping[str, Any]], **conditions: Any) -> None:
    """Enter evaluated tasks (with `task`, `episodes` and a tally) into the stage's row.

    `conditions` are what made the episodes (level, first seed, steps executed of each chunk). A row under
    other conditions begins anew: its numbers could not be compared.
    """
    file = stage_folder / SUCCESS_FILE
    tasks: dict[str, Any] = {}
    if file.is_file():
        stored = read_json(file)
        tasks = stored["tasks"] if stored["conditions"] == conditions else {}
    for result in results:
        tasks[str(result["task"])] = {
            name: result[name] for name in ("successes", "trials", "success", "interval_95", "mean_score")
        }
    write_json(
        file, {"conditions": conditions, "tasks": dict(sorted(tasks.items(), key=lambda t: int(t[0])))}
    )
