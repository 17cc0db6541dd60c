"""A reader that has seen enough is no error."""

from __future__ import annotations

import subprocess
import sys


def test_head_ends_a_command_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "kuavo_smolvla_ros.cli", "bringup", "sim", "--show-args"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # long before it has anything to say
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
