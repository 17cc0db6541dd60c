"""The experiment's parts one after the other; each keeps what it has made, and does what is missing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kuavo_smolvla_ros.experiment.gather import Gathering, gather
from kuavo_smolvla_ros.experiment.measured import (
    HELD_OUT,
    OTHERS,
    OTHERS_HELD_OUT,
    Conditions,
    Measured,
    kept,
    machine,
)
from kuavo_smolvla_ros.experiment.play import Manner
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.experiment.trials import (
    Trial,
    TrialLog,
    TrialSettings,
    can_play,
    run_trials,
    summary,
)
from kuavo_smolvla_ros.experiment.ways import (
    CURRICULUM,
    TASK_FILES,
    TrainingSettings,
    curriculum_of,
    root_of,
    stages_of,
    train,
)
from kuavo_smolvla_ros.learning.paraphrases import held_out_paraphrases
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.stage import Curriculum

PARTS = ("gather", "see", "train", "play", "tell")
TASKS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Spoken:
    """A sentence said in the scene of `task`, and what kind of sentence it is there."""

    what: str
    task: int
    sentence: str


@dataclass(frozen=True)
class Experiment:
    """What to do, and where."""

    output: Path
    demonstrations: int
    seeing: SeeingSettings
    training: TrainingSettings
    trials: TrialSettings
    ways: tuple[str, ...]
    device: str
    workers: int
    figures: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Experiment:
        manner = Manner(
            latency_s=args.latency, n_action_steps=args.n_action_steps, noise_scale=args.noise_scale
        )
        return cls(
            args.output.resolve(),
            args.demonstrations,
            SeeingSettings(steps=args.seeing_steps),
            TrainingSettings(steps=tuple(args.steps)),
            TrialSettings(episodes=args.trials, manner=manner),
            tuple(args.ways),
            args.device,
            args.workers,
            args.figures,
        )

    def run(self, parts: Sequence[str]) -> None:
        for part in PARTS:
            if part in parts:
                getattr(self, part)()

    def gather(self) -> None:
        for wanted in self._gatherings():
            name = TASK_FILES[wanted.task - 1]
            with tqdm(total=wanted.episodes, desc=f"demonstrations of {name}", unit="episode") as bar:
                told = gather(wanted, self._demonstrations(wanted.task), bar.update)
            print(f"{name}: {wanted.episodes} episodes, {told['frames']} frames, {told['tried']} tried")

    def _gatherings(self) -> list[Gathering]:
        return [Gathering(task, self.demonstrations) for task in TASKS]

    def _demonstrations(self, task: int) -> Path:
        return self.output / "demonstrations" / TASK_FILES[task - 1]

    def see(self) -> None:
        from kuavo_smolvla_ros.experiment.eyes import base_config, learn_to_see

        settings = self.seeing
        about = {"seeing": asdict(settings), "data": [asdict(g) for g in self._gatherings()]}
        kept = self._kept("seeing", about)
        if kept is None:
            folders = [self._demonstrations(task) for task in TASKS]
            with tqdm(total=settings.steps, desc="learning to see", unit="step") as bar:

                def progress(loss: float) -> None:
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.4f}")

                kept = learn_to_see(folders, base_config(folders[0]), settings, self._seeing, progress)
            self._keep("seeing", about, kept)
        for name, errors in kept.items():
            listed = ", ".join(f"{thing} {error:.0f} mm" for thing, error in errors.items()) or "unknown"
            print(f"{name}: tells where things are within {listed} (rms, episodes it never saw)")

    @property
    def _seeing(self) -> Path:
        return self.output / "seeing"

    @cached_property
    def _planned(self) -> tuple[Curriculum, RunSettings]:
        return curriculum_of(self.training, self._seeing, self.output, self.device)

    @property
    def _curriculum(self) -> Curriculum:
        return self._planned[0]

    def train(self) -> None:
        from kuavo_smolvla_ros.learning.interruption import interruptible

        curriculum, run = self._planned
        # The references share the curriculum's stages where they are the same.
        for way in sorted(self.ways, key=lambda way: way != CURRICULUM):
            with interruptible() as interruption:
                if not train(way, curriculum, run, interruption=interruption, say=print):
                    raise KeyboardInterrupt

    def trial_of(self, way: str, stage: int, task: int) -> Trial | None:
        """The trial of a way's stage at a task, where the stage is trained and the policy can play it."""
        folder = self._checkpoint(way, stage)
        return Trial(str(folder), task) if folder is not None and can_play(folder, task) else None

    def _checkpoint(self, way: str, stage: int) -> Path | None:
        """A stage's result; the curriculum's own where a reference shares it."""
        curriculum = self._curriculum
        stages = stages_of(way, curriculum)
        name = stages[stage].name
        roots = [root_of(way, self.output)]
        if way != CURRICULUM and stage < len(curriculum) and stages[stage].hash == curriculum[stage].hash:
            roots.append(root_of(CURRICULUM, self.output))
        for root in roots:
            if (root / name / "training_results.json").is_file():
                return root / name / "best"
        return None

    def cells(self) -> Iterator[tuple[str, int, int]]:
        """Way, stage and task of every trial that is told of: all tasks seen so far; alone, its own."""
        for way in self.ways:
            if way == "joint":
                yield from ((way, 0, task) for task in TASKS)
            elif way == "single":
                yield from ((way, task - 1, task) for task in TASKS)
            else:
                yield from ((way, stage, task) for stage in range(len(TASKS)) for task in TASKS[: stage + 1])

    def play(self) -> None:
        log = TrialLog(self.output, self.trials)
        trials = [trial for cell in self.cells() if (trial := self.trial_of(*cell)) is not None]
        trials = list(dict.fromkeys([*trials, *(trial for _, trial in self.spoken())]))
        wanted = Gathering(1, 1)
        total = sum(len(log.missing(trial)) for trial in trials)
        with tqdm(total=total, desc="trials", unit="episode") as bar:

            def progress(trial: Trial, episode: dict[str, Any]) -> None:
                bar.update()
                bar.set_postfix(stage=Path(trial.checkpoint).parent.name, task=trial.task)

            run_trials(
                trials, self.trials, (wanted.height, wanted.width), log,
                workers=self.workers, device=self.device, progress=progress,
            )  # fmt: skip

    def spoken(self) -> Iterator[tuple[Spoken, Trial]]:
        """What the curriculum's last policy is told instead of a task's own sentence."""
        last = self._checkpoint(CURRICULUM, len(TASKS) - 1) if CURRICULUM in self.ways else None
        if last is None:
            return
        own = {stage.task.number: stage.task.instruction for stage in self._curriculum}
        held_out = {task: held_out_paraphrases()[file] for task, file in zip(TASKS, TASK_FILES, strict=True)}
        for task in TASKS:
            others = [other for other in TASKS if other != task]
            for what, sentences in (
                (HELD_OUT, held_out[task]),
                (OTHERS, [own[other] for other in others]),
                (OTHERS_HELD_OUT, [sentence for other in others for sentence in held_out[other]]),
            ):
                share = -(-self.trials.episodes // len(sentences))
                for sentence in sentences:
                    yield Spoken(what, task, sentence), Trial(str(last), task, sentence, share)

    def measured(self) -> Measured:
        """What was played whole here."""
        log = TrialLog(self.output, self.trials)
        on = {"machine": machine()}
        cells = {}
        for cell in self.cells():
            trial = self.trial_of(*cell)
            if trial is not None and not log.missing(trial):
                cells[cell] = summary(log.episodes(trial)) | on
        spoken: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for said, trial in self.spoken():
            if log.missing(trial):
                return Measured(cells)
            spoken.setdefault((said.what, said.task), []).extend(log.episodes(trial))
        return Measured(cells, {said: summary(episodes) | on for said, episodes in spoken.items()})

    def tell(self) -> None:
        from kuavo_smolvla_ros.experiment.results import write_results

        conditions = Conditions(self.demonstrations, self.seeing, self.training, self.trials)
        measured = self.measured()
        for folder in filter(None, (self.output, self.figures)):
            earlier, other_conditions = kept(folder, conditions)
            if other_conditions:
                print(other_conditions)
            print(write_results(measured.over(earlier), conditions, folder))

    def _kept(self, name: str, about: Any) -> Any:
        file = self.output / f"{name}.json"
        if not file.is_file():
            return None
        told = json.loads(file.read_text())
        return told["result"] if told["about"] == json.loads(json.dumps(about)) else None

    def _keep(self, name: str, about: Any, result: Any) -> None:
        text = json.dumps({"about": about, "result": result}, indent=2)
        (self.output / f"{name}.json").write_text(text + "\n")
