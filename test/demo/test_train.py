"""What the demo asks of the training is the beginning of the curriculum, and what it tells to do by hand."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

from kuavo_smolvla_ros.demo import evaluate, train
from kuavo_smolvla_ros.demo.drive import DriveStep, Stage
from kuavo_smolvla_ros.demo.evaluate import EvaluateStep
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.demo.steps import steps
from kuavo_smolvla_ros.demo.train import TrainStep
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.stage_config import read_request
from kuavo_smolvla_ros.paths import share_dir

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


def test_the_evaluation_by_hand_is_one_that_the_program_takes(tmp_path: Path) -> None:
    (line,) = EvaluateStep(episodes=3).commands(place(tmp_path, (1, 2, 3, 4)))
    program, *arguments = line.removeprefix("python ").split()
    args = runpy.run_path(str(share_dir() / program))["parse"](arguments)
    assert args.checkpoint == str(tmp_path / "train/x/best")
    assert (args.tasks, args.episodes, args.first_seed) == ([1, 2, 3, 4], 3, 100)


def test_an_evaluation_that_fails_ends_with_what_it_said(tmp_path: Path) -> None:
    program = "print('first'); raise SystemExit('the checkpoint is for another robot')"
    with pytest.raises(UserError, match="status 1: first the checkpoint is for another robot"):
        evaluate._run([sys.executable, "-c", program], Place(tmp_path))


def test_of_training_only_what_a_newcomer_can_read_is_said() -> None:
    said: list[str] = []
    brief = train._Brief(said.append, 150)
    lines = [
        "note: task2 works elsewhere than the tasks before",
        "  task1: forgotten (loss 1.5, 1.00 x its loss when learnt). Train this stage again",
        "task2: 150 steps of 16 samples; main 441,632 parameters",
        "step 10/150  loss 1.7",
        "step 30/150  loss 1.5",
        "step 37/150  loss 1.4",
        "step 150/150  loss 0.9",
    ]
    for line in lines:
        brief(line)
    assert said == [lines[2], lines[4], lines[6]]


@pytest.mark.parametrize(
    ("state", "reason", "resumes", "held"),
    [
        ("holding", "policy_lost", True, {"policy_lost": 1}),
        ("holding", "policy_lost", False, {}),  # it is not ready yet
        ("holding", "starved", True, {}),  # the next chunk ends it
        ("following", "", True, {}),
    ],
)
def test_arms_that_hold_by_themselves_are_asked_to_resume(
    state: str, reason: str, resumes: bool, held: dict[str, int]
) -> None:
    class Asked(Stage):
        def __init__(self) -> None:
            self.held, self._executor = Counter(), SimpleNamespace(now={"state": state, "reason": reason})

        def _resumes(self) -> bool:
            return resumes

    stage = Asked()
    assert stage._moves() is (state == "following")
    assert stage.held == held
