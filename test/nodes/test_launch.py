"""The launch files under the real launch system: arguments, what is started, and a run of it to its end.

`launch` and `launch_ros` come with a ROS installation and not from PyPI; without them all of this is skipped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rosgraph_msgs.msg import Clock

from kuavo_smolvla_ros.nodes.bringup import BRINGUPS, LOOPBACK
from kuavo_smolvla_ros.paths import PACKAGE, share_dir

pytest.importorskip(
    "launch_ros.actions", reason="the launch system is not installed (a ROS installation has it)"
)

LAUNCH = share_dir() / "launch"
EXECUTABLES = ("executor_node", "policy_node", "recorder_node", "sim_node")

SHOW = """
import json, sys
from launch import LaunchContext
from launch.launch_description_sources import get_launch_description_from_any_launch_file
from launch.utilities import perform_substitutions
description = get_launch_description_from_any_launch_file(sys.argv[1])
context = LaunchContext()
print(json.dumps({
    a.name: [perform_substitutions(context, a.default_value), a.description, a.choices]
    for a in description.get_launch_arguments()
}))
"""
RUN = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import AnyLaunchDescriptionSource
given = [tuple(text.split(":=", 1)) for text in sys.argv[2:]]
source = AnyLaunchDescriptionSource(sys.argv[1])
service = LaunchService()
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=given)])
)
sys.exit(service.run())
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of this package as launch looks for one, running the code of this checkout."""
    made = tmp_path_factory.mktemp("prefix")
    executables = made / "lib" / PACKAGE
    index = made / "share" / "ament_index" / "resource_index" / "packages"
    for folder in (executables, index):
        folder.mkdir(parents=True)
    (index / PACKAGE).touch()
    (made / "share" / PACKAGE).symlink_to(share_dir())
    for name in EXECUTABLES:
        script = executables / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {PACKAGE}.nodes.{name} "$@"\n')
        script.chmod(0o755)
    return made


class Launched:
    """A launch file being run."""

    def __init__(self, file: str, arguments: dict[str, str], env: dict[str, str], log: Path) -> None:
        line = [sys.executable, "-c", RUN, str(LAUNCH / file), *(f"{k}:={v}" for k, v in arguments.items())]
        self._log = log
        with log.open("w") as stream:
            self.popen = subprocess.Popen(
                line, stdout=stream, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def end(self) -> int:
        """As Ctrl-C in a terminal: to the whole group."""
        os.killpg(self.popen.pid, signal.SIGINT)
        return self.popen.wait(30)

    def kill(self) -> None:
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


@pytest.fixture
def launch(stage: Any, prefix: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    running: list[Launched] = []
    paths = [str(prefix), sys.prefix, *filter(None, [os.environ.get("AMENT_PREFIX_PATH")])]
    env = stage.env | {"AMENT_PREFIX_PATH": os.pathsep.join(paths), "ROS_LOG_DIR": str(tmp_path / "log")}
    env["PYTHONPATH"] = os.pathsep.join([str(share_dir()), *filter(None, [env.get("PYTHONPATH")])])

    def start(file: str, **arguments: str) -> Launched:
        made = Launched(file, arguments, env, tmp_path / f"launch_{len(running)}.log")
        running.append(made)
        return made

    yield start
    for made in running:
        made.kill()


@pytest.mark.parametrize("name", sorted(BRINGUPS))
def test_arguments_are_shown_with_their_meaning(name: str) -> None:
    """What `ros2 launch ... --show-args` prints."""
    line = [sys.executable, "-c", SHOW, str(LAUNCH / f"{name}.launch.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
    shown = json.loads(done.stdout)
    wanted = (*BRINGUPS[name].arguments, LOOPBACK)
    assert list(shown) == [argument.name for argument in wanted]
    for argument in wanted:
        default, meaning, choices = shown[argument.name]
        assert (default, choices) == (argument.text, list(argument.choices) or None)
        assert meaning.startswith(argument.meaning)


def test_policy_and_executor_start_with_their_parameters_and_end_together(
    stage: Any, robot: Any, launch: Any, checkpoint: Path
) -> None:
    executor, policy = stage.status_of("kuavo/executor"), stage.status_of("kuavo/policy")
    run = launch(
        "policy.launch.py",
        checkpoint=str(checkpoint),
        instruction="1: it's a trap",
        namespace="kuavo",
        limit_profile="first_run",
        loopback="true",
    )
    executor.wait(dry_run="True", limits="first_run", state="idle")
    policy.wait(active="True", instruction="1: it's a trap", mode="realtime")
    assert run.end() == 0
    for name in ("executor_node", "policy_node"):
        assert f"[{name}" in run.output
    assert "Traceback" not in run.output


def test_when_one_process_dies_the_others_are_ended(stage: Any, launch: Any) -> None:
    """A policy node without a checkpoint ends at once, and the executor with it."""
    run = launch("policy.launch.py", loopback="true")
    assert run.popen.wait(60) is not None
    assert "no checkpoint: set the parameter 'checkpoint'" in run.output
    first = next(line for line in run.output.splitlines() if "was required" in line)
    assert "policy_node" in first
    assert run.output.count("process has") == 2, "no process is left"


def test_simulator_runs_and_ends(stage: Any, launch: Any) -> None:
    ticks: list[Any] = []
    with stage.lock:
        stage.node.create_subscription(Clock, "/clock", ticks.append, 10)
    run = launch("sim.launch.py", task="2", picture_height="48", picture_width="64", loopback="true")
    stage.wait_for(lambda: len(ticks) > 20, "the simulator's clock")
    assert run.end() == 0
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dry_run": "maybe"}, "dry_run is true or false, not 'maybe'"),
        ({"mode": "fast"}, 'provided value "fast" is not valid'),
    ],
)
def test_wrong_argument_is_a_sentence(launch: Any, arguments: dict[str, str], says: str) -> None:
    run = launch("policy.launch.py", **arguments)
    assert run.popen.wait(60) == 1
    assert says in run.output.replace("\n", " ")


def test_gazebo_starts_what_is_described(launch: Any) -> None:
    """Where there is no Gazebo, launch says so by name; the rest of the description has loaded."""
    run = launch("gazebo.launch.py", headless="true", loopback="true")
    said = run.output if run.popen.poll() is not None else ""
    try:
        run.popen.wait(60)
    except subprocess.TimeoutExpired:
        assert run.end() == 0  # there is a Gazebo, and it runs
        return
    said = run.output
    assert "'gz'" in said or "ros_gz_bridge" in said
