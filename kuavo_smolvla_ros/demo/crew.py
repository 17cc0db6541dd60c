"""Nodes in processes of their own, on this machine only; their output goes to files."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.bringup import Process
from kuavo_smolvla_ros.nodes.command_line import command_line

STOP_WITHIN_S = 10.0
LAST_LINES = 8
# Fast DDS's ports stay below the kernel's ephemeral range only for these domains.
DOMAINS = range(1, 102)
PR_SET_PDEATHSIG = 1


class Crew:
    """Processes that end together; one that ends by itself is an error."""

    def __init__(self, logs: Path) -> None:
        dds.apply(loopback=True)
        # Of its own, so that neither a robot nor another demo on this machine is in the way.
        self.domain = DOMAINS[os.getpid() % len(DOMAINS)]
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, executable: str, **parameters: Any) -> None:
        """Start a node of this package under a name, in place of the one that has it."""
        self.stop(name)
        self._logs.mkdir(parents=True, exist_ok=True)
        line = command_line(Process(name, executable, parameters))
        environment = os.environ | {"ROS_DOMAIN_ID": str(self.domain), "PYTHONUNBUFFERED": "1"}
        with self._log(name).open("ab") as log:
            # A group of its own: Ctrl-C ends the demo, and the demo ends these in order.
            self._running[name] = subprocess.Popen(
                line,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def check(self) -> None:
        """Fail where one has ended by itself, with the end of its log."""
        for name, process in self._running.items():
            if process.poll() is not None:
                lines = self._log(name).read_text(errors="replace").splitlines()[-LAST_LINES:]
                text = "\n  ".join(lines)
                raise UserError(f"{name} ended with status {process.returncode}; its log ends with\n  {text}")

    def send(self, name: str, number: signal.Signals) -> None:
        """Send a signal to one of them."""
        self._running[name].send_signal(number)

    def stop(self, name: str) -> None:
        """End one of them as Ctrl-C would."""
        process = self._running.pop(name, None)
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _reap(process, time.monotonic() + STOP_WITHIN_S)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last that was started first: what moves the arms goes before the robot does."""
        for name in reversed(list(self._running)):
            self.stop(name)


def end_with_parent() -> None:
    """A demo that is killed leaves no simulator behind (Linux only; elsewhere it would)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _reap(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
