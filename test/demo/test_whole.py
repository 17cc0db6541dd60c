"""The road itself, with real processes: one short episode is recorded over ROS, converted and judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.data.dataset_reader import DatasetReader
from kuavo_smolvla_ros.data.recording_metadata import read_recording_metadata
from kuavo_smolvla_ros.demo.drive import DriveStep
from kuavo_smolvla_ros.demo.evaluate import EvaluateStep
from kuavo_smolvla_ros.demo.steps import steps, walk
from kuavo_smolvla_ros.demo.train import TrainStep
from kuavo_smolvla_ros.robot.spec import load_spec

pytest.importorskip("mujoco")

TASK = "task3_placement"  # the shortest
TASKS = ["task1_moving_grasp", "task2_weighing", TASK, "task4_sorting"]


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kuavo_smolvla_ros.cli", "demo", "--out", str(out)]
    return subprocess.run(
        [*line, "--tasks", "3", "--episodes", "1", "--until", "report", *arguments],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_an_episode_goes_over_ros_into_a_dataset(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = demo(out)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] is True
    steps: dict[str, Any] = summary["steps"]
    (episode,) = steps["record"]["episodes"]
    assert episode["lost"] == ""
    assert 5.0 < episode["seconds"] < 30.0
    (dataset,) = steps["convert"]["datasets"]
    assert dataset["left_out"] == [], "the simulator waits for its cameras, so nothing is missing"
    assert dataset["frames"] == pytest.approx(10 * episode["seconds"], abs=15)
    (judged,) = steps["report"]["datasets"]
    assert judged["verdicts"]["bad"] == 0
    assert (out / judged["videos"][0]).stat().st_size > 10_000

    # What was commanded went over the robot's topics, at the rate of commands, and the arms followed it.
    spec = load_spec(str(out / "robots" / "kuavo_sim.yaml"))
    with open_bag(out / "recordings" / episode["bag"]) as bag:
        times = [m.receive_ns for m in bag.messages({spec.streams["arm_command"].topic})]
        metadata = read_recording_metadata(bag.metadata)
        assert bag.damages == []
    assert len(times) == pytest.approx(100 * episode["seconds"], rel=0.02)
    assert metadata is not None
    assert (metadata.task, metadata.fingerprint) == (TASK, spec.fingerprint)
    assert 0.0 <= judged["lag_s"][0] < 0.3
    reader = DatasetReader.open(out / dataset["root"])
    ready = [spec.poses["task3_ready"].get(name, 0.0) for name in spec.state_names]
    assert abs(reader.episode(0).state[0] - ready).max() < 0.1, "recorded from its first moment on"

    again = demo(out)
    assert again.returncode == 0
    assert again.stdout.count("done already") == 4


@pytest.mark.slow
def test_what_was_recorded_is_trained_on_and_drives(tmp_path: Path) -> None:
    """Few steps, so nothing is learnt; but every part meets its neighbours, and a stop holds."""
    road = [
        *steps((1, 2, 3, 4), 2)[:4],
        TrainStep(steps=10),
        EvaluateStep(episodes=1, max_steps=16),
        DriveStep(seconds=1.0),
    ]
    said: list[str] = []
    notes = walk(tmp_path, road, said.append)
    told = {note.name: note.figures for note in notes}
    assert [episode["lost"] for episode in told["record"]["episodes"]] == [""] * 8
    assert [dataset["verdicts"]["good"] for dataset in told["report"]["datasets"]] == [2] * 4
    assert told["train"]["tasks"] == TASKS
    assert [len(row) for row in told["train"]["forgetting"]["loss"]] == [4] * 4
    assert (tmp_path / told["train"]["page"]).is_file()
    assert [(task["name"], task["trials"]) for task in told["evaluate"]["tasks"]] == [(t, 1) for t in TASKS]
    drive = told["drive"]
    assert drive["failures"] == 0
    assert drive["chunks"] > 5
    assert [task["task"] for task in drive["tasks"]] == TASKS
    assert sum(task["refused_chunks"] for task in drive["tasks"]) < drive["chunks"] / 2
    assert drive["tasks"][0]["stop_reason"] == "operator_stop"
    assert drive["switch"]["to"] == "task1_moving_grasp"
    for task in drive["tasks"]:
        assert (tmp_path / task["video"]).stat().st_size > 5_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is True
    assert list(summary["steps"]) == ["check", "record", "convert", "report", "train", "evaluate", "drive"]
    page = (tmp_path / "report.html").read_text()
    assert "steps are done" not in page
    assert "videos/drive_task2_weighing.mp4" in page
