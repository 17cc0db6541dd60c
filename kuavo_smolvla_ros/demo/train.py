"""The stages in a row with the tiny network, by what `training/train_sequential.py` does.

Some seconds of training on two episodes of each task teach no task. What is shown is the road: each stage
begins with the one before, replays the earlier tasks, and is held against all of them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.demo.convert import DATASETS, start_anew_for
from kuavo_smolvla_ros.demo.road import Place, Say

TRAIN = "train"
# Fewer vision layers from stage to stage, as in the curriculum; the tiny network has four.
UNFROZEN = ("[-1,-2,-3]", "[-1,-2,-3]", "[-1,-2]", "[-1]")


@dataclass(frozen=True)
class TrainStep:
    """Some steps of every stage."""

    steps: int = 150
    batch: int = 16
    chunk: int = 16
    lr: float = 2e-3  # of a network that begins with nothing; the curriculum's own is for a pretrained one

    name = "train"
    title = "train the stages in a row with the tiny network, with replay and a forgetting report"

    def settings(self) -> Mapping[str, Any]:
        return asdict(self)

    def commands(self, place: Place) -> Sequence[str]:
        return tuple(
            f"python training/train_sequential.py {' '.join(overrides)}" for overrides in self._stages(place)
        )

    def _stages(self, place: Place) -> list[list[str]]:
        """What is given on the command line for each stage."""
        tasks = [entry["task"] for entry in place.told["convert"]["datasets"]]
        files = ",".join(f"tasks/{task}" for task in tasks)
        shared = [
            f"curriculum=[{files}]",
            f"data.root={place.root / DATASETS}",
            f"run.output_root={place.root / TRAIN}",
            "run.device=cpu",
            f"run.batch_size={self.batch}",
            "run.num_workers=0",
            "run.log_freq_steps=10",
            f"run.save_freq_steps={max(1, self.steps // 4)}",
            "run.save_freq_epochs=1000",
            "run.keep_last=0",
            "run.min_free_gib=0.5",
            "run.tensorboard=false",
        ]
        own = [
            "policy.backbone=tiny",
            f"policy.chunk_size={self.chunk}",
            "policy.num_steps=5",
            f"optimizer.lr={self.lr}",
            f"optimizer.vision_lr={self.lr / 10}",
            "schedule.warmup_steps=10",
            f"training.effective_batch_size={self.batch}",
            "training.precision=no",
            "training.epochs=1000",
            f"training.max_steps={self.steps}",
            "validation.freq_epochs=1000",
            "validation.max_frames_per_task=32",
            "validation.noise_samples=2",
        ]
        stages = []
        for number, task in enumerate(tasks):
            begins = ["init=scratch"] if number == 0 else []
            layers = f"policy.unfreeze_vision_layers={UNFROZEN[number]}"
            stages.append([f"task=tasks/{task}", *begins, *shared, *own, layers])
        return stages

    def run(self, place: Place) -> dict[str, Any]:
        from kuavo_smolvla_ros.learning.curriculum_run import make_accelerator, run_stages
        from kuavo_smolvla_ros.learning.interruption import interruptible
        from kuavo_smolvla_ros.learning.lerobot_source import open_task
        from kuavo_smolvla_ros.learning.stage_config import read_request
        from kuavo_smolvla_ros.video_decoder import choose_video_backend

        # Of torchvision's next version but one; a newcomer can do nothing about it.
        warnings.filterwarnings("ignore", message="The video decoding and encoding capabilities")
        # A stage that was trained with other settings, or on other data, is refused rather than gone on with.
        start_anew_for(place.root / TRAIN, {"settings": self.settings(), "data": place.told["convert"]})
        backend = choose_video_backend()
        accelerator = None
        for overrides in self._stages(place):
            request = read_request(overrides)
            accelerator = accelerator or make_accelerator(request.stages, request.run)
            with interruptible() as interruption:
                finished = run_stages(
                    request.curriculum,
                    request.run,
                    accelerator,
                    lambda task, chunk: open_task(task, chunk, video_backend=backend),
                    interruption=interruption,
                    selected=request.selected,
                    say=_Brief(place.say, self.steps),
                )
            if not finished:
                raise KeyboardInterrupt
            _tell_losses(place, request.stages[-1].name)
        return _told(place)


class _Brief:
    """Of what training says: that a stage begins, and a line now and then.

    Verdicts and advice are for networks that have learnt something; the training's own page has them.
    """

    def __init__(self, say: Say, steps: int) -> None:
        self._say, self._every = say, max(1, steps // 5)

    def __call__(self, text: str) -> None:
        said = re.match(r"step (\d+)/", text)
        if " steps of " in text or (said and int(said[1]) % self._every == 0):
            self._say(text)


def _tell_losses(place: Place, stage: str) -> None:
    """How far each task is from what was demonstrated, at the end of a stage."""
    results = json.loads((place.root / TRAIN / stage / "training_results.json").read_text())
    losses = ", ".join(f"task {number} {loss:.2f}" for number, loss in results["best_validation"].items())
    place.say(f"{stage}: held-out loss: {losses}")


def _told(place: Place) -> dict[str, Any]:
    """Losses when learnt and at the end, from what the stages have left."""
    root = place.root / TRAIN
    tasks = [entry["task"] for entry in place.told["convert"]["datasets"]]
    results = [json.loads((root / task / "training_results.json").read_text()) for task in tasks]
    return {
        "checkpoint": str((root / tasks[-1] / "best").relative_to(place.root)),
        "page": str((root / "report.html").relative_to(place.root)),
        "tasks": tasks,
        "forgetting": json.loads((root / "forgetting.json").read_text())["curriculum"],
        "best_loss": [result["best_loss"] for result in results],
    }


def checkpoint(place: Place) -> Path:
    """The policy at the end of the last stage."""
    return place.root / place.told[TrainStep.name]["checkpoint"]
