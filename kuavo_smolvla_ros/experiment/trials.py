"""How often each trained stage does each task: played episodes, kept one by one, so that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.experiment.gather import cameras
from kuavo_smolvla_ros.experiment.play import Manner, play
from kuavo_smolvla_ros.learning.success import tally

LOG = "trials.jsonl"


@dataclass(frozen=True)
class Trial:
    """A checkpoint at a task; `sentence` where another than the task's own is said."""

    checkpoint: str
    task: int
    sentence: str | None = None


@dataclass(frozen=True)
class TrialSettings:
    episodes: int = 50
    first_seed: int = 0
    level: str = "easy"
    manner: Manner = field(default_factory=Manner)


def play_trial(
    trial: Trial, settings: TrialSettings, size: tuple[int, int], seeds: Sequence[int], device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """The episodes of these seeds; pictures have the `size` (height, width) of the demonstrations'."""
    from kuavo_smolvla_ros.policy.runtime import PolicyRunner
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.sim.simulation import Simulation
    from kuavo_smolvla_ros.sim.tasks import make_task

    runner = PolicyRunner.load(trial.checkpoint, device=device)
    task = make_task(trial.task, settings.level)
    spec = load_spec("kuavo_mobile" if task.mobile else "kuavo_sim")
    sim = Simulation(task, cameras(*size))
    for seed in seeds:
        yield asdict(play(sim, spec, runner, seed, settings.manner, sentence=trial.sentence))
    sim.close()


def can_play(checkpoint: Path, task: int) -> bool:
    """Whether a policy has the actions a task needs: before task 4 there is no base among them."""
    from kuavo_smolvla_ros.policy.checkpoint import read_json
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.sim.tasks import make_task

    spec = load_spec("kuavo_mobile" if make_task(task).mobile else "kuavo_sim")
    names = read_json(checkpoint / "config.json")["action_names"]
    return tuple(names[: len(spec.action_names)]) == spec.action_names


class TrialLog:
    """Episodes played so far. One line each; a line cut short by an interruption is left out."""

    def __init__(self, folder: Path, settings: TrialSettings) -> None:
        self._file = folder / LOG
        self._conditions = {**asdict(settings), "episodes": None}
        self._settings = settings
        self._rows: list[dict[str, Any]] = []
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if row["conditions"] == self._conditions:
                    self._rows.append(row)

    def missing(self, trial: Trial) -> list[int]:
        """Seeds of this trial that have not been played."""
        first = self._settings.first_seed
        played = {row["episode"]["seed"] for row in self._rows if row["trial"] == asdict(trial)}
        return [seed for seed in range(first, first + self._settings.episodes) if seed not in played]

    def add(self, trial: Trial, episode: dict[str, Any]) -> None:
        row = {"conditions": self._conditions, "trial": asdict(trial), "episode": episode}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self._rows.append(row)

    def tally(self, trial: Trial) -> dict[str, Any]:
        """Successes, interval and score of the trial's episodes."""
        seeds = range(self._settings.first_seed, self._settings.first_seed + self._settings.episodes)
        episodes = [
            row["episode"]
            for row in self._rows
            if row["trial"] == asdict(trial) and row["episode"]["seed"] in seeds
        ]
        return {
            **tally(episodes),
            "mean_time_s": sum(episode["time_s"] for episode in episodes) / len(episodes),
            "refused": sum(episode["refused"] for episode in episodes),
            "stopped": sum(bool(episode["stops"]) for episode in episodes),
        }


def run_trials(
    trials: Sequence[Trial],
    settings: TrialSettings,
    size: tuple[int, int],
    log: TrialLog,
    *,
    progress: Callable[[Trial, dict[str, Any]], None] = lambda trial, episode: None,
) -> None:
    """Play what is missing, one after the other."""
    for trial in trials:
        if missing := log.missing(trial):
            for episode in play_trial(trial, settings, size, missing):
                log.add(trial, episode)
                progress(trial, episode)
