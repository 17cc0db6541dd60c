"""How often a trained stage does a task: played episodes, kept one by one, so that nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from kuavo_smolvla_ros.experiment.gather import cameras
from kuavo_smolvla_ros.experiment.play import Manner, Played, play
from kuavo_smolvla_ros.learning.success import tally
from kuavo_smolvla_ros.policy.checkpoint import read_json

if TYPE_CHECKING:
    from kuavo_smolvla_ros.policy.sampler import SamplerOptions

LOG = "trials.jsonl"
_KNOWN = {each.name for each in fields(Played)}  # of an episode; a row of an earlier version may lack some
AT_A_TIME = 10
"""Episodes between two loads of a policy: so many may be lost by an interruption, per process."""


@dataclass(frozen=True)
class Trial:
    """A checkpoint at a task; `sentence`, where it is not the task's own; `episodes`, where not all."""

    checkpoint: str
    task: int
    sentence: str | None = None
    episodes: int | None = None


@dataclass(frozen=True)
class TrialSettings:
    episodes: int = 50
    first_seed: int = 0
    level: str = "easy"
    manner: Manner = field(default_factory=Manner)

    def seeds(self, trial: Trial) -> range:
        count = self.episodes if trial.episodes is None else min(trial.episodes, self.episodes)
        return range(self.first_seed, self.first_seed + count)


def play_episodes(
    trial: Trial,
    settings: TrialSettings,
    size: tuple[int, int],
    seeds: Sequence[int],
    device: str = "cpu",
    options: SamplerOptions | None = None,
) -> list[dict[str, Any]]:
    """The episodes of these seeds; pictures have the `size` (height, width) of the demonstrations'."""
    import torch

    from kuavo_smolvla_ros.policy.runtime import PolicyRunner
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.sim.simulation import Simulation
    from kuavo_smolvla_ros.sim.tasks import make_task

    torch.set_num_threads(1)
    runner = PolicyRunner.load(
        trial.checkpoint,
        device=device,
        overrides={"noise_scale": settings.manner.noise_scale},
        options=options,
    )
    task = make_task(trial.task, settings.level)
    spec = load_spec(task.robot)
    sim = Simulation(task, cameras(*size))
    episodes = [
        asdict(play(sim, spec, runner, seed, settings.manner, sentence=trial.sentence)) for seed in seeds
    ]
    sim.close()
    return episodes


def can_play(checkpoint: Path, task: int) -> bool:
    """Whether a policy has the actions a task needs: before task 4 there is no base among them."""
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.sim.tasks import make_task

    wanted = load_spec(make_task(task).robot).action_names
    names = read_json(checkpoint / "config.json")["action_names"]
    return tuple(names[: len(wanted)]) == wanted


class TrialLog:
    """Episodes played so far, one line each. What was played otherwise, or by a policy that has been trained
    anew since, does not count.
    """

    def __init__(self, folder: Path, settings: TrialSettings) -> None:
        self._file = folder / LOG
        self._settings = settings
        self._conditions = {**asdict(settings), "episodes": None}
        self._rows: list[dict[str, Any]] = []
        if self._file.is_file():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            self._rows = [row for line in lines if (row := _parsed(line)) and self._counts(row)]

    def _counts(self, row: dict[str, Any]) -> bool:
        return row["conditions"] == self._conditions and row["episode"].keys() == _KNOWN

    def _key(self, trial: Trial) -> dict[str, Any]:
        # A policy is named by its weights' time as well: another one may come to lie there.
        weights = Path(trial.checkpoint) / "model.safetensors"
        return {
            "checkpoint": trial.checkpoint,
            "made_ns": weights.stat().st_mtime_ns,
            "task": trial.task,
            "sentence": trial.sentence,
        }

    def episodes(self, trial: Trial) -> list[dict[str, Any]]:
        """What was played of this trial."""
        key, seeds = self._key(trial), self._settings.seeds(trial)
        found = {row["episode"]["seed"]: row["episode"] for row in self._rows if row["trial"] == key}
        return [found[seed] for seed in seeds if seed in found]

    def missing(self, trial: Trial) -> list[int]:
        """Seeds of this trial that have not been played."""
        played = {episode["seed"] for episode in self.episodes(trial)}
        return [seed for seed in self._settings.seeds(trial) if seed not in played]

    def add(self, trial: Trial, episode: dict[str, Any]) -> None:
        row = {"conditions": self._conditions, "trial": self._key(trial), "episode": episode}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self._rows.append(json.loads(json.dumps(row)))


def summary(episodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Successes with their interval, score, and how the arms fared."""
    return {
        **tally(episodes),
        "mean_time_s": sum(episode["time_s"] for episode in episodes) / len(episodes),
        "refused": sum(episode["refused"] for episode in episodes),
        "stopped": sum(bool(episode["stops"]) for episode in episodes),
        "median_moved_rad": median(episode["moved_rad"] for episode in episodes),
    }


def _parsed(line: str) -> dict[str, Any] | None:
    """A row; None for a line that was cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def run_trials(
    trials: Sequence[Trial],
    settings: TrialSettings,
    size: tuple[int, int],
    log: TrialLog,
    *,
    workers: int = 1,
    device: str = "cpu",
    progress: Callable[[Trial, dict[str, Any]], None] = lambda trial, episode: None,
) -> None:
    """Play what is missing, in so many processes."""
    jobs = [
        (trial, missing[first : first + AT_A_TIME])
        for trial in trials
        for missing in [log.missing(trial)]
        for first in range(0, len(missing), AT_A_TIME)
    ]

    def take(trial: Trial, episodes: Sequence[dict[str, Any]]) -> None:
        for episode in episodes:
            log.add(trial, episode)
            progress(trial, episode)

    if workers == 1:
        for trial, seeds in jobs:
            take(trial, play_episodes(trial, settings, size, seeds, device))
        return
    # Neither OpenGL nor CUDA survives a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(play_episodes, trial, settings, size, seeds, device): trial for trial, seeds in jobs
        }
        for future in as_completed(waiting):
            take(waiting[future], future.result())
