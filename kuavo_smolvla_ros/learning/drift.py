"""Statistics through the curriculum: frozen when a dimension is first seen, and how far later tasks lie off.

Switching statistics with the task is the known way to lose everything learnt before, because the same numbers
would then mean other positions. So they stay, and what is watched instead is whether they still suit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kuavo_smolvla_ros.learning.sources import ACTION, STATE, TaskSource
from kuavo_smolvla_ros.policy.dimensions import DEFAULT_STD_FLOOR, Statistics, StatisticsError

# In deviations of the frozen statistics. The flow starts from noise of deviation 1: what lies far outside is
# reached late and coarsely, and what fills only a small part of it drowns in the noise.
SHIFT_LIMIT = 2.0
REACH_LIMIT = 6.0
SPREAD_LIMIT = 0.1


def stage_statistics(
    sources: Sequence[TaskSource], inherited: Statistics | None = None, std_floor: float = DEFAULT_STD_FLOOR
) -> Statistics:
    """The statistics of a stage: inherited ones as they are, then each task's for dimensions not seen before.

    `sources` are the stage's tasks in the curriculum's order.
    """
    statistics = Statistics() if inherited is None else inherited
    for source in sources:
        offered = Statistics.from_dataset(source.stats, source.facts.widths, std_floor)
        statistics = statistics.extended_by(offered)
    require_unchanged(Statistics() if inherited is None else inherited, statistics)
    return statistics


def require_unchanged(before: Statistics, after: Statistics) -> None:
    """Fail unless `after` states the same numbers for every dimension `before` knows."""
    lost = [key for key in before if key not in after or after[key].width < before[key].width]
    if lost:
        raise StatisticsError(
            f"the statistics of {', '.join(lost)} know fewer dimensions than the stage before; a checkpoint "
            "carries every dimension ever seen"
        )
    changed = before.differs_on_known(after)
    if changed:
        raise StatisticsError(
            f"the statistics of {', '.join(changed)} are not those of the stage before "
            f"({before.sha256[:12]}, now {after.sha256[:12]}); they must stay, or all earlier tasks are "
            "lost: start from a checkpoint of this curriculum"
        )


@dataclass(frozen=True)
class DimensionDrift:
    """One dimension of a task, in frozen deviations; `first_seen`: the task itself sets the statistics."""

    feature: str
    name: str
    shift: float  # of the mean
    spread: float  # deviation of the task, as a multiple of the frozen one
    lowest: float
    highest: float
    first_seen: bool

    @property
    def reach(self) -> float:
        return max(-self.lowest, self.highest)


@dataclass(frozen=True)
class DriftReport:
    """A task against the statistics it will be normalised with."""

    task: str
    dimensions: tuple[DimensionDrift, ...]
    statistics_sha256: str

    @property
    def advice(self) -> tuple[str, ...]:
        """A sentence for each kind of misfit, naming the dimensions; none where all is well."""
        sentences = []
        off = [d for d in self._compared if abs(d.shift) > SHIFT_LIMIT]
        far = [d for d in self._compared if d.reach > REACH_LIMIT]
        narrow = [d for d in self._compared if d.spread < SPREAD_LIMIT]
        if off:
            sentences.append(
                f"{self.task} works elsewhere than the tasks before: its mean lies more than {SHIFT_LIMIT:g} "
                f"deviations off in {_listed(off, 'shift')}. Expect slow learning there; if earlier tasks "
                "need not be kept, put the task that moves most first"
            )
        if far:
            sentences.append(
                f"{self.task} reaches more than {REACH_LIMIT:g} deviations out in {_listed(far, 'reach')}. "
                "Look for outliers or another unit in the data; if they are right, raise policy.std_floor "
                "before the first stage, or begin the curriculum with this task"
            )
        if narrow:
            sentences.append(
                f"{self.task} uses less than {SPREAD_LIMIT:g} of the frozen deviation in "
                f"{_listed(narrow, 'spread')}: fine movements there are small against the flow's noise. "
                "Harmless for joints that stand still in this task"
            )
        return tuple(sentences)

    @property
    def _compared(self) -> tuple[DimensionDrift, ...]:
        return tuple(d for d in self.dimensions if not d.first_seen)

    def table(self) -> str:
        """One line per dimension."""
        head = f"{'dimension':<34}{'shift':>8}{'spread':>8}{'lowest':>8}{'highest':>8}  (frozen deviations)"
        rows = [
            f"{d.feature + ' ' + d.name:<34}{d.shift:>8.2f}{d.spread:>8.2f}{d.lowest:>8.2f}{d.highest:>8.2f}"
            + ("  first seen" if d.first_seen else "")
            for d in self.dimensions
        ]
        return "\n".join([head, *rows])

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "statistics_sha256": self.statistics_sha256,
            "advice": list(self.advice),
            "dimensions": [asdict(d) for d in self.dimensions],
        }


def drift(
    source: TaskSource, inherited: Statistics | None, std_floor: float = DEFAULT_STD_FLOOR
) -> DriftReport:
    """Compare a task with the statistics of the stage before; what those lack, the task sets itself."""
    used = stage_statistics([source], inherited, std_floor)
    dimensions = []
    for key, names in ((STATE, source.facts.state_names), (ACTION, source.facts.action_names)):
        known = 0 if inherited is None or key not in inherited else inherited[key].width
        mean, std = (np.asarray(values)[: len(names)] for values in (used[key].mean, used[key].std))
        low, high, middle = ((_values(source, key, name) - mean) / std for name in ("min", "max", "mean"))
        spread = _values(source, key, "std") / std
        dimensions += [
            DimensionDrift(
                key,
                name,
                float(middle[i]),
                float(spread[i]),
                float(low[i]),
                float(high[i]),
                first_seen=i >= known,
            )
            for i, name in enumerate(names)
        ]
    return DriftReport(source.name, tuple(dimensions), used.sha256)


def _values(source: TaskSource, key: str, name: str) -> Any:
    if name not in source.stats[key]:
        raise StatisticsError(
            f"the statistics of {key} in {source.name} lack {name}; convert the data set again"
        )
    return np.asarray(source.stats[key][name], np.float64).reshape(-1)


def _listed(found: Sequence[DimensionDrift], value: str, most: int = 4) -> str:
    worst = sorted(found, key=lambda d: -abs(getattr(d, value)))
    shown = ", ".join(f"{d.feature} {d.name} ({getattr(d, value):.2g})" for d in worst[:most])
    return shown + (f" and {len(worst) - most} more" if len(worst) > most else "")
