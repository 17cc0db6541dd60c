"""A checkpoint in the simulator: every episode counted, the same again, and the wrong robot refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kuavo_smolvla_ros.policy.untrained import save_untrained
from kuavo_smolvla_ros.robot.spec import load_spec

PROGRAM = Path(__file__).parents[2] / "training" / "evaluate.py"


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(load_spec("kuavo_sim"), tmp_path_factory.mktemp("policy"), pose="task2_ready")


def test_episodes_are_counted_with_their_interval_and_are_the_same_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--tasks", "2", "--episodes", "2", "--max-steps", "3", "--n-action-steps", "2")
    first = evaluate(
        str(checkpoint), *options, "--json", str(tmp_path / "a.json"), "--videos", str(tmp_path / "v")
    )
    assert first.returncode == 0, first.stderr[-2000:]
    assert "task 2 task2_weighing: 0 of 2 (0%, 95 % interval 0% to 66%)" in first.stdout
    result = json.loads((tmp_path / "a.json").read_text())["tasks"][0]
    assert [episode["seed"] for episode in result["episodes"]] == [0, 1]
    assert all(episode["steps"] == 3 and not episode["success"] for episode in result["episodes"])
    assert sorted(file.name for file in (tmp_path / "v").iterdir()) == ["task2_seed0.mp4", "task2_seed1.mp4"]
    again = evaluate(str(checkpoint), *options, "--json", str(tmp_path / "b.json"))
    assert again.returncode == 0
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())


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
    checkpoint: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    result = evaluate(str(checkpoint), *arguments)
    assert result.returncode == code, result.stderr[-2000:]
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
