"""A checkpoint in the simulator: every episode counted, the same again, and the wrong robot refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.policy.untrained import save_untrained
from kuavo_smolvla_ros.robot.spec import load_spec

PROGRAM = Path(__file__).parents[2] / "training" / "evaluate.py"
Evaluate = Callable[..., tuple[int, str]]
SHORT = ("--max-steps", "3", "--n-action-steps", "2")


@pytest.fixture
def evaluate(start_program: Callable[..., Any], tmp_path: Path) -> Evaluate:
    """Run the program; its exit status, and what it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        printed = tmp_path / "printed"
        printed.unlink(missing_ok=True)
        process = start_program([str(PROGRAM), *map(str, arguments)], printed)
        process.join(280)
        return process.exitcode, printed.read_text()

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(load_spec("kuavo_sim"), tmp_path_factory.mktemp("policy"), pose="task2_ready")


def test_episodes_are_counted_with_their_interval_and_are_the_same_again(
    checkpoint: Path, tmp_path: Path, evaluate: Evaluate
) -> None:
    options = ("--tasks", "2", "--episodes", "2", *SHORT)
    code, printed = evaluate(checkpoint, *options, "--json", tmp_path / "a.json", "--videos", tmp_path / "v")
    assert code == 0, printed[-2000:]
    assert "task 2 task2_weighing: 0 of 2 (0%, 95 % interval 0% to 66%)" in printed
    result = json.loads((tmp_path / "a.json").read_text())["tasks"][0]
    assert [episode["seed"] for episode in result["episodes"]] == [0, 1]
    assert all(episode["steps"] == 3 and not episode["success"] for episode in result["episodes"])
    assert sorted(file.name for file in (tmp_path / "v").iterdir()) == ["task2_seed0.mp4", "task2_seed1.mp4"]
    code, _ = evaluate(checkpoint, *options, "--json", tmp_path / "b.json")
    assert code == 0
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())


def test_all_stages_of_a_curriculum_become_the_success_matrix(
    checkpoint: Path, tmp_path: Path, evaluate: Evaluate, write_stage: Callable[..., None]
) -> None:
    root = tmp_path / "run"
    for number in (1, 2):
        write_stage(root, number)
        shutil.copytree(checkpoint, root / f"task{number}" / "best")
    code, printed = evaluate(
        root,
        "--tasks",
        "1",
        "2",
        "4",
        "--episodes",
        "1",
        *SHORT,
        "--workers",
        "2",
        "--json",
        tmp_path / "a.json",
    )
    assert code == 0, printed[-2000:]
    assert "task1: task 2 task2_weighing: 0 of 1" in printed
    assert "task2: not evaluated: task 4 needs the actions" in printed
    entry = json.loads((root / "forgetting.json").read_text())["curriculum"]["success"]
    assert entry["success"] == [[0.0, 0.0], [0.0, 0.0]]
    assert entry["figures"]["average"] == 0.0
    assert "Success in simulation after the last stage" in (root / "report.html").read_text()
    stages = json.loads((tmp_path / "a.json").read_text())["stages"]
    assert [len(stage["tasks"]) for stage in stages] == [2, 2]


def test_a_stages_result_alone_enters_its_row(
    checkpoint: Path, tmp_path: Path, evaluate: Evaluate, write_stage: Callable[..., None]
) -> None:
    write_stage(tmp_path / "run", 1)
    best = tmp_path / "run" / "task1" / "best"
    shutil.copytree(checkpoint, best)
    code, printed = evaluate(best, "--tasks", "1", "--episodes", "1", *SHORT)
    assert code == 0, printed[-2000:]
    assert f"kept in {best.parent}" in printed
    assert json.loads((best.parent / "success.json").read_text())["tasks"]["1"]["trials"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--tasks", "4"), 1, "task 4 needs the actions"),
        (("--tasks", "9"), 2, "there is no task 9"),
        (("--episodes", "0"), 2, "at least 1"),
        (("--tasks", "2", "--n-action-steps", "99"), 1, "a chunk has 50 steps"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    checkpoint: Path, evaluate: Evaluate, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    status, printed = evaluate(checkpoint, *arguments)
    assert status == code, printed[-2000:]
    assert sentence in printed
    assert "Traceback" not in printed
