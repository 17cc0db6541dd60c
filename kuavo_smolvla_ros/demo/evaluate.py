"""Some episodes of each task in closed loop, by `training/evaluate.py` itself.

A policy of minutes does not do the tasks, and a few episodes could not tell if it did. What is shown is how
it is measured: the same seeds mean the same episodes, and success comes with its interval.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kuavo_smolvla_ros.demo.crew import end_with_parent
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.demo.train import checkpoint
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.paths import share_dir

RESULT = "success.json"
LOG = "logs/evaluate.log"
TELL_EVERY_S = 15.0


@dataclass(frozen=True)
class EvaluateStep:
    """The last stage's policy, on seeds that no demonstration had."""

    episodes: int = 2
    first_seed: int = 100
    max_steps: int = 250  # 25 s: no demonstration took longer
    n_action_steps: int = 8

    name = "evaluate"
    title = "evaluate the policy in closed loop: some episodes of each task, with intervals"

    def settings(self) -> Mapping[str, Any]:
        return asdict(self)

    def commands(self, place: Place) -> Sequence[str]:
        return (f"python training/evaluate.py {' '.join(self._arguments(place))}",)

    def _arguments(self, place: Place) -> list[str]:
        tasks = [task.removeprefix("task").partition("_")[0] for task in place.told["train"]["tasks"]]
        return [
            str(checkpoint(place)),
            *("--tasks", *tasks),
            *("--episodes", str(self.episodes), "--first-seed", str(self.first_seed)),
            *("--max-steps", str(self.max_steps), "--n-action-steps", str(self.n_action_steps)),
            *("--workers", str(min(2, os.cpu_count() or 1)), "--device", "cpu"),
            *("--json", str(place.root / RESULT)),
        ]

    def run(self, place: Place) -> dict[str, Any]:
        program = share_dir() / "training" / "evaluate.py"
        if not program.is_file():
            raise UserError(f"{program} is missing; the demo is run from a checkout of the repository")
        place.say(
            f"{self.episodes} episodes of each task, {self.max_steps / 10:g} simulated seconds at most; "
            "minutes of training do not make a policy that succeeds"
        )
        _run([sys.executable, str(program), *self._arguments(place)], place)
        tasks = json.loads((place.root / RESULT).read_text())["tasks"]
        for task in tasks:
            low, high = task["interval_95"]
            place.say(
                f"{task['name']}: {task['successes']} of {task['trials']} "
                f"(95 % interval {low:.0%} to {high:.0%}), mean score {task['mean_score']:.1f}"
            )
        return {"max_steps": self.max_steps, "first_seed": self.first_seed, "tasks": tasks}


def _run(line: Sequence[str], place: Place) -> None:
    """Run to its end, saying now and then that it goes on; it ends with this process."""
    log = place.root / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two workers share the cores
    begun = told = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            line,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            while True:
                try:
                    status = process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() - told >= TELL_EVERY_S:
                        told = time.monotonic()
                        place.say(f"evaluating for {told - begun:.0f} s")
        except BaseException:
            _end(process)
            raise
    if status:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise UserError(f"evaluate.py ended with status {status}: {' '.join(last)} (see {log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The program and its workers, which are of one group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
