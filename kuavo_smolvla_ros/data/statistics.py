"""The statistics that normalisation needs, gathered while the data passes by; nothing is read again for them.

The keys are LeRobot's: min, max, mean, std (of the population), count, q01, q10, q50, q90, q99.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Stats = dict[str, NDArray]

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
QUANTILE_KEYS = tuple(f"q{round(q * 100):02d}" for q in QUANTILES)
LEVELS = 256
BINS = 1 << 16


def vector_stats(values: NDArray) -> Stats:
    """Statistics over the first axis; a flat series counts as one number per step."""
    table = values.reshape(len(values), -1).astype(np.float64)
    quantiles = np.quantile(table, QUANTILES, axis=0)
    return {
        "min": values.reshape(len(values), -1).min(axis=0),
        "max": values.reshape(len(values), -1).max(axis=0),
        "mean": table.mean(axis=0),
        "std": table.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILE_KEYS, quantiles, strict=True)),
    }


def sampled_steps(length: int) -> list[int]:
    """The steps LeRobot looks at for an episode's picture statistics: length^0.75 of them, 100 to 10000."""
    count = max(min(100, length), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, count)).astype(int).tolist()


def sampling_stride(height: int, width: int) -> int:
    """LeRobot thins large pictures to about 150 pixels along the longer side."""
    if max(height, width) < 300:
        return 1
    return int((width if width > height else height) / 150)


class PictureStats:
    """Per-channel statistics in 0..1 of the sampled pictures, from exact counts of all 256 levels."""

    def __init__(self, length: int) -> None:
        self._steps = frozenset(sampled_steps(length))
        self._counts = np.zeros((3, LEVELS), np.int64)
        self._pictures = 0

    def observe(self, step: int, picture: NDArray[np.uint8]) -> None:
        if step not in self._steps:
            return
        stride = sampling_stride(*picture.shape[:2])
        thin = picture[::stride, ::stride]
        for channel in range(3):
            self._counts[channel] += np.bincount(thin[..., channel].ravel(), minlength=LEVELS)
        self._pictures += 1

    def result(self) -> Stats:
        levels = np.arange(LEVELS) / 255
        total = self._counts.sum(axis=1)
        mean = self._counts @ levels / total
        variance = (self._counts * (levels - mean[:, None]) ** 2).sum(axis=1) / total
        columns = {
            "min": levels[(self._counts > 0).argmax(axis=1)],
            "max": levels[LEVELS - 1 - (self._counts[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(variance),
            **{
                key: np.array([_count_quantile(channel, q) / 255 for channel in self._counts])
                for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True)
            },
        }
        stats = {key: value.reshape(3, 1, 1) for key, value in columns.items()}
        return {**stats, "count": np.array([self._pictures])}


def _count_quantile(counts: NDArray[np.int64], q: float) -> float:
    """The q-quantile (linear, as numpy's) of a series of which only the count per level is known."""
    position = q * (counts.sum() - 1)
    below = int(np.floor(position))
    cumulated = counts.cumsum()
    low = int(np.searchsorted(cumulated, below, side="right"))
    high = int(np.searchsorted(cumulated, min(below + 1, cumulated[-1] - 1), side="right"))
    return low + (position - below) * (high - low)


def aggregate(parts: Sequence[Stats]) -> Stats:
    """Statistics of all parts together; quantiles are LeRobot's estimate, the mean weighted by count."""
    counts = np.concatenate([part["count"] for part in parts]).astype(np.float64)
    weights = counts / counts.sum()
    means = np.stack([part["mean"] for part in parts])
    weights = weights.reshape(-1, *[1] * (means.ndim - 1))
    mean = (weights * means).sum(axis=0)
    spread = np.stack([part["std"] for part in parts]) ** 2 + (means - mean) ** 2
    return {
        "min": np.stack([part["min"] for part in parts]).min(axis=0),
        "max": np.stack([part["max"] for part in parts]).max(axis=0),
        "mean": mean,
        "std": np.sqrt((weights * spread).sum(axis=0)),
        "count": np.array([sum(int(part["count"][0]) for part in parts)]),
        **{key: (weights * np.stack([part[key] for part in parts])).sum(axis=0) for key in QUANTILE_KEYS},
    }


def quantiles_of(
    batches: Callable[[], Iterable[NDArray]], lower: NDArray, upper: NDArray, bins: int = BINS
) -> Stats:
    """Quantiles of a series too long to hold, given its bounds: within (upper - lower) / bins of numpy's.

    A mean of episodes' quantiles is not the quantile of the whole (a gripper that is open in most episodes
    and closed in some has a 1 % quantile that no such mean finds), so the numbers are counted once more.
    """
    lower, upper = lower.astype(np.float64), upper.astype(np.float64)
    width = len(lower)
    span = np.where(upper > lower, upper - lower, 1.0)
    counts = np.zeros(width * bins, np.int64)
    offsets = np.arange(width) * bins
    for batch in batches():
        scaled = (batch.reshape(len(batch), width).astype(np.float64) - lower) / span * bins
        places = np.clip(scaled.astype(np.int64), 0, bins - 1) + offsets
        counts += np.bincount(places.ravel(), minlength=width * bins)
    table = counts.reshape(width, bins)
    result = {}
    for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True):
        inside = np.array([_count_quantile(row, q) + 0.5 for row in table]) / bins
        result[key] = np.clip(lower + inside * (upper - lower), lower, upper)
    return result


def to_lists(stats: Stats) -> dict[str, list]:
    return {key: value.tolist() for key, value in stats.items()}


def from_lists(stats: dict[str, list]) -> Stats:
    return {key: np.array(value) for key, value in stats.items()}
