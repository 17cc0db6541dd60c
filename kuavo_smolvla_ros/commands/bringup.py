"""Start nodes together without the launch system: logs with names, one Ctrl-C for all, none left behind."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.nodes.command_line import command_line

if TYPE_CHECKING:
    from kuavo_smolvla_ros.nodes.bringup import Process

EPILOG = """examples:
  kuavo-smolvla bringup sim task:=2
  kuavo-smolvla bringup sim task:=1 checkpoint:=outputs/policy instruction:=task1_moving_grasp dry_run:=false
  kuavo-smolvla bringup policy robot:=kuavo checkpoint:=outputs/policy instruction:=task2_weighing
  kuavo-smolvla bringup record robot:=kuavo task:=task2_weighing

When one process ends, the others are stopped too."""

STOP_WITHIN_S = 5.0
POLL_S = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("what", help="policy, sim, gazebo or record")
    parser.add_argument("arguments", nargs="*", metavar="NAME:=VALUE", help="arguments, as for ros2 launch")
    parser.add_argument("--show-args", action="store_true", help="list the arguments and end")


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros import dds
    from kuavo_smolvla_ros.nodes.bringup import BRINGUPS, LOOPBACK

    if args.what not in BRINGUPS:
        raise UsageError(f"there is no bringup '{args.what}'; choose one of {', '.join(BRINGUPS)}")
    bringup = BRINGUPS[args.what]
    if args.show_args:
        print(f"{bringup.name}: {bringup.meaning}")
        for argument in (*bringup.arguments, LOOPBACK):
            choices = f" ({', '.join(argument.choices)})" if argument.choices else ""
            print(f"  {argument.name}:={argument.text:<14} {argument.meaning}{choices}")
        return 0
    given = dict(_pair(text) for text in args.arguments)
    loopback = LOOPBACK.read(given.pop(LOOPBACK.name, LOOPBACK.text))
    processes = bringup.processes(given)
    dds.apply(loopback=loopback)
    return Crew(processes).work()


def _pair(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":=")
    if not colon or not name:
        raise UsageError(f"'{text}' is not NAME:=VALUE")
    return name, value


class Crew:
    """Processes that live and end together."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._plans = processes
        self._running: list[tuple[str, subprocess.Popen[str]]] = []
        self._ending = threading.Event()

    def work(self) -> int:
        """Run until one ends or a signal comes; the exit status of the first that ended by itself."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: self._ending.set()) for number in numbers}
        try:
            for plan in self._plans:
                self._start(plan)
            first = self._wait_for_end()
        finally:
            self._stop_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        if first is None:
            return 0
        name, code = first
        print(f"[bringup] {name} ended with status {code}; the others were stopped", flush=True)
        return 1 if code else 0

    def _start(self, plan: Process) -> None:
        line = command_line(plan)
        if shutil.which(line[0]) is None:
            raise UserError(
                f"{plan.name}: there is no program '{line[0]}'; install it, or source what has it"
            )
        # A group of their own, so that Ctrl-C reaches them once, from here, and in order.
        child = subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._running.append((plan.name, child))
        threading.Thread(target=_relay, args=(plan.name, child), daemon=True).start()

    def _wait_for_end(self) -> tuple[str, int] | None:
        while not self._ending.wait(POLL_S):
            for name, child in self._running:
                code = child.poll()
                if code is not None:
                    return name, code
        return None

    def _stop_all(self) -> None:
        """The policy first, then the executor, so that the arms come to rest before the robot is gone."""
        for _, child in reversed(self._running):
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_WITHIN_S
        for name, child in self._running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"[bringup] {name} does not end and is killed", flush=True)
                child.kill()
                child.wait()


def _relay(name: str, child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(f"[{name}] {line}", end="", flush=True)
