"""Which task a sentence means to a policy, without moving anything.

For one observation each task's own sentence gives a chunk; a sentence means the task whose chunk its own is
nearest to, all drawn from the same noise. That says something only where sentences make a difference at all:
`contrast` is how far the nearest two tasks' chunks are apart, in multiples of how far one task's chunk moves
when only the noise changes. At 1 or below, the policy does not listen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.learning.metrics import wilson
from kuavo_smolvla_ros.paths import config_dir

HELD_OUT = "paraphrases_held_out.yaml"
Array = NDArray[np.floating[Any]]


class Runner(Protocol):
    """The part of `policy.runtime.PolicyRunner` that is asked."""

    def chunk(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        instruction: str,
        *,
        seed: int | None = None,
    ) -> np.ndarray:
        """Actions (steps, width) in robot units."""


@dataclass(frozen=True)
class Observation:
    """What the policy sees: pictures by camera, and the state."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray


@dataclass(frozen=True)
class Heard:
    """A sentence in one observation: the task nearest to it, and its distance to each."""

    sentence: str
    nearest: str
    distances: Mapping[str, float]


@dataclass(frozen=True)
class TaskReach:
    """How often the paraphrases of a task reached it, and where the others went."""

    trials: int
    reached: int
    elsewhere: Mapping[str, int]

    @property
    def share(self) -> float:
        return self.reached / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        found = wilson(self.reached, self.trials)
        return found.low, found.high


@dataclass(frozen=True)
class LanguageResult:
    """Per task the reach of its paraphrases over all observations; the contrast in each observation."""

    tasks: Mapping[str, TaskReach]
    contrasts: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of all trials."""
        return sum(t.reached for t in self.tasks.values()) / sum(t.trials for t in self.tasks.values())

    @property
    def contrast(self) -> float:
        """The median over observations."""
        return float(np.median(self.contrasts))

    def to_dict(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "contrast": self.contrast,
            "contrasts": list(self.contrasts),
            "tasks": {
                name: {
                    "trials": task.trials,
                    "reached": task.reached,
                    "share": task.share,
                    "interval_95": list(task.interval),
                    "elsewhere": dict(task.elsewhere),
                }
                for name, task in self.tasks.items()
            },
        }


def held_out_paraphrases(path: Path | None = None) -> dict[str, tuple[str, ...]]:
    """Sentences by task that no training sees; the shipped ones, or those of a file of the same form."""
    path = config_dir() / "policy" / HELD_OUT if path is None else path
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    good = isinstance(given, dict) and all(
        isinstance(lines, list) and lines and all(isinstance(line, str) and line.strip() for line in lines)
        for lines in given.values()
    )
    if not good:
        raise UsageError(f"{path} is no list of sentences for each task")
    return {str(name): tuple(lines) for name, lines in given.items()}


def hear(
    runner: Runner,
    observation: Observation,
    own_sentences: Mapping[str, str],
    sentences: Sequence[str],
    *,
    seed: int = 0,
) -> list[Heard]:
    """What each sentence means in this observation, among tasks given with their own sentence."""
    canonical = _chunks(runner, observation, own_sentences, seed)
    divisor = _spread(canonical)
    found = []
    for sentence in sentences:
        chunk = runner.chunk(observation.images, observation.state, sentence, seed=seed)
        distances = {name: _distance(chunk, other, divisor) for name, other in canonical.items()}
        found.append(Heard(sentence, min(distances, key=lambda name: distances[name]), distances))
    return found


def contrast(
    runner: Runner,
    observation: Observation,
    own_sentences: Mapping[str, str],
    *,
    seed: int = 0,
    other_seed: int = 1,
) -> float:
    """Distance of the two tasks hardest to tell apart, in multiples of what another noise does to one."""
    canonical = _chunks(runner, observation, own_sentences, seed)
    again = _chunks(runner, observation, own_sentences, other_seed)
    divisor = _spread(canonical)
    by_noise = float(np.mean([_distance(canonical[n], again[n], divisor) for n in canonical]))
    by_sentence = min(_distance(canonical[a], canonical[b], divisor) for a, b in combinations(canonical, 2))
    if by_noise == 0.0:
        return math.inf if by_sentence > 0.0 else 0.0
    return by_sentence / by_noise


def listen(
    runner: Runner,
    observations: Sequence[Observation],
    own_sentences: Mapping[str, str],
    paraphrases: Mapping[str, Sequence[str]],
    *,
    seed: int = 0,
) -> LanguageResult:
    """Every paraphrase in every observation. The tasks compared are those of `own_sentences`."""
    unknown = [name for name in paraphrases if name not in own_sentences]
    if unknown or len(own_sentences) < 2 or not observations or not paraphrases:
        raise UsageError(
            "a language test needs an observation and paraphrases of at least two known tasks; unknown "
            f"are {', '.join(unknown) or 'none'}, known {', '.join(own_sentences)}"
        )
    went: dict[str, list[str]] = {name: [] for name in paraphrases}
    for number, observation in enumerate(observations):
        for name, sentences in paraphrases.items():
            heard = hear(runner, observation, own_sentences, sentences, seed=seed + number)
            went[name] += [each.nearest for each in heard]
    return LanguageResult(
        {
            name: TaskReach(
                len(places),
                places.count(name),
                {other: places.count(other) for other in own_sentences if other != name and other in places},
            )
            for name, places in went.items()
        },
        tuple(contrast(runner, o, own_sentences, seed=seed + n) for n, o in enumerate(observations)),
    )


def _chunks(
    runner: Runner, observation: Observation, own_sentences: Mapping[str, str], seed: int
) -> dict[str, np.ndarray]:
    return {
        name: runner.chunk(observation.images, observation.state, sentence, seed=seed)
        for name, sentence in own_sentences.items()
    }


def _spread(canonical: Mapping[str, np.ndarray]) -> Array:
    """Per joint, how far the tasks' chunks are apart, so that one unit does not drown the others.

    A joint that no task moves differently says nothing.
    """
    stacked = np.stack(list(canonical.values()))
    spread = np.ptp(stacked, axis=0).max(axis=0)
    return np.where(spread > 0.0, spread, np.inf)


def _distance(one: np.ndarray, other: np.ndarray, divisor: Array) -> float:
    return float(np.mean(np.abs(one - other) / divisor))
