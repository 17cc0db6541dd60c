"""How a node is started by hand: the command line of a process of a bringup."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.nodes.bringup import Process
from kuavo_smolvla_ros.paths import PACKAGE


def command_line(process: Process) -> list[str]:
    """How a node is started by hand."""
    if process.command:
        return list(process.command)
    if process.package == PACKAGE:
        line = [sys.executable, "-m", process.module]
    else:  # of another package, which only a ROS installation can have
        line = ["ros2", "run", process.package, process.executable]
    line += ["--ros-args", "-r", f"__node:={process.name}"]
    if process.namespace:
        line += ["-r", f"__ns:=/{process.namespace.strip('/')}"]
    for name, value in process.parameters.items():
        line += ["-p", f"{name}:={as_yaml(value)}"]
    return line


def as_yaml(value: Any) -> str:
    """Text stays text: '1' as an instruction is no number."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, Path)):
        return "'" + str(value).replace("'", "''") + "'"
    return str(value)
