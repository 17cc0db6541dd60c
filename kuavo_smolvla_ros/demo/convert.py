"""The recordings become a dataset for each task, by what `training/convert_bags.py` does."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.demo.record import RECORDINGS, ROBOTS
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.errors import UserError

DATASETS = "datasets"


@dataclass(frozen=True)
class ConvertStep:
    """One dataset per task, as the curriculum wants them."""

    name = "convert"
    title = "convert the recordings into LeRobot datasets, one for each task"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def commands(self, place: Place) -> Sequence[str]:
        return tuple(
            f"python training/convert_bags.py {' '.join(overrides)}"
            for overrides in (_overrides(place, *task) for task in _tasks(place))
        )

    def run(self, place: Place) -> dict[str, Any]:
        start_anew_for(place.root / DATASETS, place.told["record"])
        return {"datasets": [self._convert(place, task, robot) for task, robot in _tasks(place)]}

    def _convert(self, place: Place, task: str, robot: str) -> dict[str, Any]:
        from kuavo_smolvla_ros.data.convert import convert
        from kuavo_smolvla_ros.data.convert_config import load_conversion
        from kuavo_smolvla_ros.data.episodes import extract
        from kuavo_smolvla_ros.data.merge import load_dataset
        from kuavo_smolvla_ros.data.pool import in_this_process
        from kuavo_smolvla_ros.data.recordings import find_recordings

        config = load_conversion(_overrides(place, task, robot))
        start = time.monotonic()
        # Starting worker processes would take longer than some seconds of recording do.
        report = convert(
            find_recordings(config.bags),
            config.dataset,
            config.settings,
            extract,
            runner=in_this_process,
            camera_threads=os.cpu_count() or 1,
        )
        took_s = time.monotonic() - start
        if report.tracebacks or not report.episodes + report.known:
            reasons = "; ".join(f"{source}: {reason}" for source, reason in report.left_out)
            raise UserError(f"nothing of {task} could be converted: {reasons}")
        info = load_dataset(config.dataset).info
        speed = round(report.seconds / took_s, 2) if report.episodes else None
        told = "converted already" if speed is None else f"{speed:.1f}x real time"
        place.say(
            f"{task}: {info['total_episodes']} episodes, {info['total_frames']} frames, left out "
            f"{len(report.left_out)}, {told}"
        )
        return {
            "task": task,
            "root": str(config.dataset.relative_to(place.root)),
            "episodes": info["total_episodes"],
            "frames": info["total_frames"],
            "left_out": [list(item) for item in report.left_out],
            "times_real_time": speed,
        }


def start_anew_for(folder: Path, origin: Mapping[str, Any]) -> None:
    """Empty a folder that was made from something else."""
    note = folder / "made_from.json"
    text = json.dumps(origin, indent=2, sort_keys=True) + "\n"
    if not note.is_file() or note.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(text)


def _tasks(place: Place) -> list[tuple[str, str]]:
    """Tasks that were recorded, with the robot of each."""
    return list(dict.fromkeys((e["task"], e["robot"]) for e in place.told["record"]["episodes"]))


def _overrides(place: Place, task: str, robot: str) -> list[str]:
    def at(*parts: str) -> Path:
        return place.root.joinpath(*parts)

    return [
        f"bags={at(RECORDINGS, task)}",
        f"dataset={at(DATASETS, task)}",
        f"robot={at(ROBOTS, f'{robot}.yaml')}",
    ]
