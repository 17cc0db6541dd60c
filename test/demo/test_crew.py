"""Processes of the demo end with it, however it ends, and say why when they end by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kuavo_smolvla_ros.demo.crew import Crew
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.command_line import as_yaml


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while is_there(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_node_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    with Crew(tmp_path) as crew:
        crew.start("recorder", "recorder_node", robot="nobody", folder=tmp_path / "bags")
        crew._running["recorder"].wait(60)
        with pytest.raises(UserError, match="recorder ended with status 1") as told:
            crew.check()
    assert "there is no robot description 'nobody'" in str(told.value)


def test_leaving_ends_all_and_a_second_of_a_name_takes_the_firsts_place(tmp_path: Path) -> None:
    with Crew(tmp_path) as crew:
        crew.start("recorder", "recorder_node", folder=tmp_path / "bags")
        first = crew._running["recorder"].pid
        crew.start("recorder", "recorder_node", folder=tmp_path / "bags")
        second = crew._running["recorder"].pid
        assert not is_there(first)
        assert is_there(second)
    assert not is_there(second)


SCRIPT = """
import sys, time
from pathlib import Path
from kuavo_smolvla_ros.demo.crew import Crew
with Crew(Path(sys.argv[1])) as crew:
    crew.start("recorder", "recorder_node", folder=sys.argv[1])
    print(crew._running["recorder"].pid, flush=True)
    time.sleep(100)
"""


def test_a_killed_demo_leaves_nobody_behind(tmp_path: Path) -> None:
    line = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    demo = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ)
    assert demo.stdout is not None
    pid = int(demo.stdout.readline())
    demo.send_signal(signal.SIGKILL)
    demo.wait()
    wait_until_gone(pid)


def test_text_stays_text() -> None:
    assert as_yaml("1") == "'1'"
    assert as_yaml("the robot's") == "'the robot''s'"
    assert (as_yaml(True), as_yaml(2.5), as_yaml(Path("/a"))) == ("true", "2.5", "'/a'")
