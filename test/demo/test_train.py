"""What the demo asks of the training is the beginning of the curriculum, and what it tells to do by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from kuavo_smolvla_ros.demo.drive import DriveStep
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.demo.steps import steps
from kuavo_smolvla_ros.demo.train import TrainStep
from kuavo_smolvla_ros.learning.stage_config import read_request

NAMES = {1: "task1_moving_grasp", 2: "task2_weighing", 3: "task3_placement", 4: "task4_sorting"}


def place(root: Path, tasks: tuple[int, ...]) -> Place:
    names = [NAMES[task] for task in tasks]
    return Place(
        root,
        told={
            "record": {"episodes": [{"robot": "kuavo_mobile" if 4 in tasks else "kuavo_sim"}]},
            "convert": {"datasets": [{"task": name} for name in names]},
            "train": {"checkpoint": "train/x/best", "tasks": names},
        },
    )


@pytest.mark.parametrize("tasks", [(1, 2, 3, 4), (1,), (1, 2)])
def test_every_stage_is_what_its_command_says(tmp_path: Path, tasks: tuple[int, ...]) -> None:
    step, here = TrainStep(steps=7), place(tmp_path, tasks)
    lines = step.commands(here)
    assert len(lines) == len(tasks)
    for number, (task, line) in enumerate(zip(tasks, lines, strict=True)):
        program, *overrides = line.removeprefix("python ").split()
        assert program == "training/train_sequential.py"
        request = read_request(overrides)
        (stage,) = request.stages
        assert stage.name == NAMES[task]
        assert [t.number for t in stage.tasks] == list(tasks[: number + 1])
        assert stage.init.kind == ("scratch" if number == 0 else "task")
        assert sum(stage.shares) == 1
        assert stage.training.max_steps == 7
        assert max(-layer for layer in dict(stage.policy)["unfreeze_vision_layers"]) <= 4
        assert request.run.root == tmp_path / "train"
        assert stage.task.datasets == (f"{tmp_path}/datasets/{NAMES[task]}",)
    if tasks == (1, 2, 3, 4):
        assert stage.shares == (Fraction(1, 10), Fraction(1, 10), Fraction(1, 5), Fraction(3, 5))


def test_only_the_curriculums_first_tasks_are_trained_on() -> None:
    assert [step.name for step in steps((1, 2))][-3:] == ["train", "evaluate", "drive"]
    for tasks, episodes in (((2, 3), 2), ((3,), 2), ((1, 2), 1)):
        assert [step.name for step in steps(tasks, episodes)][-1] == "report"


@pytest.mark.parametrize(("tasks", "robot"), [((1, 2), "kuavo_sim"), ((1, 2, 3, 4), "kuavo_mobile")])
def test_the_policy_drives_the_robot_of_its_widest_task(
    tmp_path: Path, tasks: tuple[int, ...], robot: str
) -> None:
    bringup, *_ = DriveStep().commands(place(tmp_path, tasks))
    assert f"robot:={tmp_path}/robots/{robot}.yaml" in bringup
    assert f"checkpoint:={tmp_path}/train/x/best" in bringup
