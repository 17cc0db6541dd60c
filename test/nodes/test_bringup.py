"""`kuavo-smolvla bringup`: several nodes in one terminal, ended together, whatever ends first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rosgraph_msgs.msg import Clock

from kuavo_smolvla_ros import cli
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS


class Brought:
    """A bringup in a process, as from a terminal."""

    def __init__(self, words: tuple[str, ...], env: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "kuavo_smolvla_ros.cli", "bringup", *words],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env | {"PYTHONUNBUFFERED": "1"},
            )

    @property
    def output(self) -> str:
        return self._log.read_text()


@pytest.fixture
def bringup(stage: Any, tmp_path: Path) -> Iterator[Callable[..., Brought]]:
    running: list[Brought] = []

    def start(*words: str) -> Brought:
        running.append(Brought((*words, "loopback:=true"), stage.env, tmp_path / f"{len(running)}.log"))
        return running[-1]

    yield start
    for brought in running:
        if brought.popen.poll() is None:
            brought.popen.terminate()
            brought.popen.wait(30)


def nodes_of(stage: Any) -> set[str]:
    """Node processes of this test: they carry its domain in their environment."""
    mine = f"ROS_DOMAIN_ID={stage.env['ROS_DOMAIN_ID']}".encode()
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().split(b"\0")
            if mine in (folder / "environ").read_bytes().split(b"\0"):
                found |= {word.decode() for word in line if word.startswith(b"kuavo_smolvla_ros.nodes.")}
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_all(stage: Any, bringup: Any, number: signal.Signals) -> None:
    ticks: list[Any] = []
    with stage.lock:
        stage.node.create_subscription(Clock, "/clock", ticks.append, 10)
    run = bringup("sim", "task:=2", "picture_height:=48", "picture_width:=64")
    stage.wait_for(lambda: len(ticks) > 20, "the simulator's clock")
    run.popen.send_signal(number)
    assert run.popen.wait(30) == 0
    assert "[kuavo_sim] " in run.output, "each line has its node's name"
    assert "Traceback" not in run.output
    assert nodes_of(stage) == set()


def test_when_one_ends_the_others_are_stopped(stage: Any, bringup: Any) -> None:
    """The policy node ends for want of a checkpoint, and the executor does not stay behind."""
    run = bringup("policy")
    assert run.popen.wait(90) == 1
    assert "[policy] " in run.output
    assert "no checkpoint: set the parameter 'checkpoint'" in run.output
    assert "[bringup] policy ended with status 1; the others were stopped" in run.output
    assert "Traceback" not in run.output
    assert nodes_of(stage) == set()


def test_killed_node_takes_the_others_along(stage: Any, bringup: Any, checkpoint: Path) -> None:
    run = bringup("policy", f"checkpoint:={checkpoint}")
    stage.wait_for(lambda: "executor_node" in str(nodes_of(stage)), "the executor")
    status = stage.status_of("executor")
    status.wait(state="idle")
    (executor,) = (
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if str(run.popen.pid) == parent_of(folder) and b"executor_node" in (folder / "cmdline").read_bytes()
    )
    os.kill(executor, signal.SIGKILL)
    assert run.popen.wait(90) == 1
    assert "[bringup] executor ended with status -9; the others were stopped" in run.output
    assert nodes_of(stage) == set()


def parent_of(folder: Path) -> str:
    try:
        return (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
    except OSError:
        return ""


@pytest.mark.parametrize("name", sorted(BRINGUPS))
def test_arguments_are_listed_with_defaults_and_meaning(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bringup", name, "--show-args"]) == 0
    out = capsys.readouterr().out
    for argument in BRINGUPS[name].arguments:
        assert f"  {argument.name}:={argument.text}" in out
        assert argument.meaning in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dance"], "there is no bringup 'dance'; choose one of policy, sim, gazebo, record"),
        (["sim", "task"], "'task' is not NAME:=VALUE"),
        (["policy", "chekpoint:=x"], "policy has no argument 'chekpoint'"),
    ],
)
def test_wrong_use_is_one_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bringup", *words]) == 2
    assert says in capsys.readouterr().err


def test_missing_program_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["bringup", "gazebo", "headless:=true"]) == 1
    assert "gazebo: there is no program 'gz'; install it, or source what has it" in capsys.readouterr().err
