"""Killed at any step and started again, a run goes on to the same numbers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from kuavo_smolvla_ros.learning.outputs import read_rows

PROGRAM = Path(__file__).parents[2] / "training" / "rehearse_curriculum.py"
OPTIONS = ("--stages", "1", "--epochs", "2", "--save-steps", "3", "--log-steps", "1")
STEPS = 24


def command(output: Path, *options: str) -> list[str]:
    return [sys.executable, str(PROGRAM), "--output", str(output), *OPTIONS, *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[tuple[int, Any]]:
    """Every number that training produced, without the times it took."""
    return [
        (row["step"], row["loss"] if row["kind"] == "train" else row["tasks"])
        for row in read_rows(folder)
        if row["kind"] in ("train", "validation")
    ]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        rows = read_rows(folder, "train")
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    subprocess.run(command(output), check=True, env=environment(), capture_output=True, timeout=250)
    return output / "task1"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_at_any_step_it_goes_on_to_the_same_losses_and_weights(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "task1"
    step = random.Random(os.urandom(8)).randint(1, STEPS - 2)
    process = subprocess.Popen(
        command(tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(folder, step, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    stopped = read_rows(folder, "train")[-1]["step"]
    if number == signal.SIGTERM:
        assert process.returncode == 0, output
        assert stopped < STEPS, "it finished before the signal came: nothing was tested"
        assert f"stopped by SIGTERM after step {stopped}, saved" in output
        progress = json.loads((folder / "last" / "training_state" / "progress.json").read_text())
        assert progress["step"] == stopped  # nothing is lost
    else:
        assert process.returncode == -signal.SIGKILL

    again = subprocess.run(
        command(tmp_path), env=environment(), capture_output=True, text=True, check=True, timeout=250
    )

    if number == signal.SIGTERM:
        assert f"goes on after step {stopped}" in again.stdout
    assert losses(folder) == losses(uninterrupted), f"stopped at {stopped} (asked at {step})"
    for name in ("last", "best"):
        ours, theirs = (load_file(place / name / "model.safetensors") for place in (folder, uninterrupted))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
    moments = [
        load_file(place / "last/training_state/optimizer.safetensors") for place in (folder, uninterrupted)
    ]
    assert all(moments[0][key].equal(moments[1][key]) for key in moments[1])


def test_a_finished_run_is_not_repeated(uninterrupted: Path) -> None:
    before = (uninterrupted / "log.jsonl").read_bytes()
    again = subprocess.run(
        command(uninterrupted.parent), env=environment(), capture_output=True, text=True, check=True
    )
    assert "finished already" in again.stdout
    assert (uninterrupted / "log.jsonl").read_bytes() == before


def test_two_processes_do_what_one_does(tmp_path: Path, uninterrupted: Path) -> None:
    """The same batch in two halves: gradients are averaged over gloo, losses agree within 1e-5."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, *command(tmp_path, "--batch-size", "16")[1:]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_rows(tmp_path / "task1", "stage")[0]["batch"]["devices"] == 2
    one, two = (read_rows(place, "train") for place in (uninterrupted, tmp_path / "task1"))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-5, rel=0)
    one, two = (read_rows(place, "validation") for place in (uninterrupted, tmp_path / "task1"))
    for a, b in zip(one, two, strict=True):
        assert b["tasks"]["1"]["loss"] == pytest.approx(a["tasks"]["1"]["loss"], abs=1e-5, rel=0)
        assert b["tasks"]["1"]["error_by_joint"] == pytest.approx(a["tasks"]["1"]["error_by_joint"], abs=1e-5)


def test_accumulating_does_what_one_pass_does(tmp_path: Path, uninterrupted: Path) -> None:
    subprocess.run(
        command(tmp_path, "--batch-size", "8", "--workers", "1"),
        check=True,
        env=environment(),
        capture_output=True,
        timeout=280,
    )
    one, four = (read_rows(place, "train") for place in (uninterrupted, tmp_path / "task1"))
    assert [row["loss"] for row in four] == pytest.approx([row["loss"] for row in one], abs=1e-5, rel=0)
