"""Small task data in memory, and stages made from it."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kuavo_smolvla_ros.learning.outputs import RunLog
from kuavo_smolvla_ros.learning.schedule import Schedule
from kuavo_smolvla_ros.learning.sources import Facts, TaskSource
from kuavo_smolvla_ros.learning.stage import (
    Initialisation,
    Optimizer,
    Stage,
    TaskData,
    Thresholds,
    Training,
    Validation,
)

CHUNK = 4
CAMERAS = {"head_cam_h": (4, 6), "wrist_cam_l": (4, 6)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROGRAM = """
import multiprocessing, os, runpy, sys, torch
out = os.open({output!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(out, 1), os.dup2(out, 2)
multiprocessing.set_start_method("fork", force=True)  # as where a program is started by hand
torch.set_num_threads(1)
os.environ.update({environment!r})
sys.argv = {argv!r}
runpy.run_path({argv!r}[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def start_program() -> Callable[..., Any]:
    """Start one of the programs in a process of its own; it writes what it prints into a file.

    The process is forked off one that has read torch and lerobot already, because reading them takes longer
    than most of what is tested. A fork of this process would not do: autograd refuses to run in one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "kuavo_smolvla_ros.learning.curriculum_run",
            "kuavo_smolvla_ros.learning.estimate",
            "kuavo_smolvla_ros.learning.lerobot_source",
            "kuavo_smolvla_ros.learning.stage_config",
            "kuavo_smolvla_ros.policy.runtime",
            "kuavo_smolvla_ros.sim.simulation",
        ]
    )

    def start(argv: Sequence[str], output: Path, **environment: str) -> Any:
        output.parent.mkdir(parents=True, exist_ok=True)
        code = PROGRAM.format(argv=list(map(str, argv)), output=str(output), environment=environment)
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        return process

    return start


@dataclass
class MemoryFrames:
    """Frames whose state carries the task's mark and the frame's number."""

    mark: int
    length: int
    state_dim: int
    action_dim: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        state = torch.zeros(self.state_dim)
        state[0], state[1] = self.mark, index
        return {
            "observation.state": state,
            "action": torch.full((CHUNK, self.action_dim), float(self.mark)),
            "action_is_pad": torch.zeros(CHUNK, dtype=torch.bool),
            **{f"observation.images.{name}": torch.zeros(3, *size) for name, size in CAMERAS.items()},
            "task": "what the data set itself says",
            f"a column only task {self.mark} has": torch.tensor(1),
        }


@pytest.fixture(scope="session")
def make_source() -> Callable[..., TaskSource]:
    def make(
        number: int = 1,
        lengths: tuple[int, ...] = (20,) * 10,
        state_dim: int = 16,
        action_dim: int = 16,
        mean: float = 0.0,
        std: float = 1.0,
        **facts: Any,
    ) -> TaskSource:
        names = [f"joint_{i}" for i in range(max(state_dim, action_dim))]
        stats = {
            key: {
                "mean": np.full(dim, mean),
                "std": np.full(dim, std),
                "min": np.full(dim, mean - 3 * std),
                "max": np.full(dim, mean + 3 * std),
            }
            for key, dim in (("observation.state", state_dim), ("action", action_dim))
        }
        return TaskSource(
            f"task{number}",
            MemoryFrames(number, sum(lengths), state_dim, action_dim),
            np.repeat(np.arange(len(lengths)), lengths),
            Facts(
                **{
                    "fps": 10.0,
                    "state_names": tuple(names[:state_dim]),
                    "action_names": tuple(names[:action_dim]),
                    "cameras": CAMERAS,
                    **facts,
                }
            ),
            stats,
        )

    return make


@pytest.fixture(scope="session")
def make_task() -> Callable[..., TaskData]:
    def make(number: int = 1, **fields: Any) -> TaskData:
        return TaskData(
            **{
                "number": number,
                "name": f"task{number}",
                "description": f"what task {number} is",
                "instruction": f"do task {number}",
                "datasets": (f"datasets/task{number}",),
                "held_out_share": 0.1,
                **fields,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_stage(make_task: Callable[..., TaskData]) -> Callable[..., Stage]:
    """A stage by its shares (one per task so far, as texts), with any field replaced."""

    def make(*shares: str, tasks: tuple[TaskData, ...] | None = None, **fields: Any) -> Stage:
        shares = shares or ("1",)
        training = {"epochs": 2, "effective_batch_size": 16, "seed": 3, **fields.pop("training", {})}
        number = len(shares)
        return Stage(
            **{
                "name": f"task{number}",
                "tasks": tuple(make_task(i) for i in range(1, number + 1)) if tasks is None else tasks,
                "shares": tuple(Fraction(share) for share in shares),
                "init": Initialisation("scratch"),
                "optimizer": Optimizer(5e-5, 5e-6, (0.9, 0.999), 1e-8, 5e-7, 1.0),
                "schedule": Schedule(1500, 25_000, 1e-6),
                "training": Training(**training),
                "validation": Validation(2, 16, 2, 0),
                "thresholds": Thresholds(0.5, 0.7, 0.8, 1.4, 1.6),
                **fields,
            }
        )

    return make


LOSSES = {  # before the stage, and at its end
    1: ({"1": 3.0}, {"1": 0.2}),
    2: ({"1": 0.2, "2": 4.0}, {"1": 0.3, "2": 0.1}),
}


def result(loss: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "open_loop_error": loss / 10,
        "error_by_joint": {"a_joint": loss / 10, "a_gripper": 0.1},
        "error_by_horizon": [0.01, 0.02],
        "gripper_accuracy": 0.9,
        "frames": 4,
    }


@pytest.fixture(scope="session")
def write_stage() -> Callable[..., None]:
    """What a stage leaves behind, as far as a report reads it: `write_stage(root, number, finished=True)`."""
    return write_stage_files


def write_stage_files(root: Path, number: int, finished: bool = True) -> None:
    folder = root / f"task{number}"
    tasks = [{"number": n, "name": f"task{n}"} for n in range(1, number + 1)]
    log = RunLog(folder, 0)
    (folder / "stage.json").write_text(
        json.dumps({"stage": {"name": f"task{number}", "tasks": tasks, "optimizer": {"lr": 1e-4}}})
    )
    shares = {str(t["number"]): 1 / number for t in tasks}
    log.write(
        "stage",
        0,
        total_steps=20,
        shares=shares,
        vision_layers=4,
        unfrozen_layers=[2, 3],
        parameters={"vision_layers": {"total": 10, "trained": 5}},
    )
    verdicts = [{"task": "task1", "loss": 0.3, "ratio": 1.5, "verdict": "degraded", "advice": "Raise <it>"}]
    before, after = LOSSES[number]
    for step, losses in ((0, before), (20, after)):
        log.write(
            "validation",
            step,
            epoch=step / 10,
            mean_loss=0.0,
            tasks={n: result(loss) for n, loss in losses.items()},
            verdicts=verdicts,
        )
        log.write(
            "train",
            step + 5,
            loss=0.5,
            lr_by_group={"main": 1e-4},
            realised_shares=shares,
            samples_per_s=10.0 * (step + 1),
            data_s=0.1,
            preprocess_s=0.2,
            update_s=0.7,
        )
    log.close()
    if finished:
        (folder / "training_results.json").write_text(
            json.dumps(
                {
                    "best_validation": after,
                    "best_loss": after[str(number)],
                    "verdicts": verdicts,
                    "elapsed_s": 60,
                }
            )
        )
