"""Forgetting and transfer from one matrix: `scores[i, j]` is task j after stage i, both from 0.

All functions take scores of which more is better (success rates). For losses give their negatives, or use
`summarise(..., higher_is_better=False)`, which also turns the results round, so that a positive backward
transfer is an improvement and a positive forgetting a deterioration for both kinds.

What was not evaluated is NaN. Names and definitions are LIBERO's (arXiv 2306.03310) where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.errors import UsageError

Scores = NDArray[np.float64]


def score_matrix(rows: Mapping[str, Mapping[str, float]], order: Sequence[str]) -> Scores:
    """The matrix of results by stage and task, in the curriculum's order; NaN where there is no result."""
    return np.array([[rows.get(i, {}).get(j, math.nan) for j in order] for i in order], np.float64).reshape(
        len(order), len(order)
    )


def average(scores: ArrayLike) -> float:
    """Mean over all tasks after the last stage (ACC): the one number in the headline."""
    return float(_learnt(scores)[-1].mean())


def negative_backward_transfer(scores: ArrayLike) -> float:
    """LIBERO's NBT: how much is lost of each task, on average over all later stages. Less is better.

    The mean is over the tasks that have a later stage: for the last one nothing is defined.
    """
    s = _several(scores)
    return float(np.mean([(s[k, k] - s[k + 1 :, k]).mean() for k in range(len(s) - 1)]))


def backward_transfer(scores: ArrayLike) -> float:
    """BWT of GEM and Avalanche: change from right after learning to the end. Negative is forgetting."""
    s = _several(scores)
    return float((s[-1, :-1] - np.diag(s)[:-1]).mean())


def max_forgetting(scores: ArrayLike) -> float:
    """The largest loss from any task's best score, at any stage, to the end."""
    s = _several(scores)
    return float(np.max(np.nanmax(s, axis=0)[:-1] - s[-1, :-1]))


def learning_speed(curve: ArrayLike) -> float:
    """LIBERO's FWT of one task: mean of its scores during its own stage, from before the first epoch on.

    From the first best value on the curve counts as flat, as if training had stopped there.
    """
    values = np.asarray(curve, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise UsageError(f"a learning curve is a row of finite scores, not {curve!r}")
    best = int(values.argmax())
    return float(np.concatenate([values[:best], np.full(len(values) - best, values[best])]).mean())


def area_under_curve(scores: ArrayLike, speeds: ArrayLike) -> float:
    """LIBERO's AUC: learning speed and scores after all later stages, averaged per task and over tasks."""
    s, f = _learnt(scores), np.asarray(speeds, np.float64)
    if f.shape != (len(s),):
        raise UsageError(f"{len(s)} tasks need as many learning speeds, there are {f.size}")
    return float(np.mean([(f[k] + s[k + 1 :, k].sum()) / (len(s) - k) for k in range(len(s))]))


def zero_shot_transfer(scores: ArrayLike, untrained: ArrayLike) -> float:
    """GEM's FWT: how much better than the untrained policy each task is done just before it is learnt."""
    s, u = _several(scores), np.asarray(untrained, np.float64)
    before = np.array([s[j - 1, j] for j in range(1, len(s))])
    if u.shape != (len(s),) or not np.isfinite(before).all():
        raise UsageError("zero-shot transfer needs every task evaluated before it is learnt, and untrained")
    return float((before - u[1:]).mean())


def joint_gap(scores: ArrayLike, joint: ArrayLike) -> float:
    """How much better training on all tasks at once is than the sequence: the price of the order."""
    return float(np.mean(np.asarray(joint, np.float64))) - average(scores)


def single_gap(scores: ArrayLike, single: ArrayLike) -> float:
    """How much better a policy of its own does each task than the sequence in the end."""
    return float(np.mean(np.asarray(single, np.float64))) - average(scores)


@dataclass(frozen=True)
class Summary:
    """All figures of one matrix; None where what they need was not measured."""

    average: float
    negative_backward_transfer: float | None
    backward_transfer: float | None
    max_forgetting: float | None
    forward_transfer: float | None
    area_under_curve: float | None
    zero_shot_transfer: float | None
    joint_gap: float | None
    single_gap: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    scores: ArrayLike,
    *,
    higher_is_better: bool = True,
    curves: Sequence[ArrayLike] | None = None,
    untrained: ArrayLike | None = None,
    joint: ArrayLike | None = None,
    single: ArrayLike | None = None,
) -> Summary:
    """Every figure the given results allow. For losses, levels (average, FWT, AUC) are losses again; all
    differences are such that forgetting, gaps and NBT are good when small, transfer when large.
    """
    sign = 1.0 if higher_is_better else -1.0
    s = sign * _learnt(scores)
    several = len(s) > 1
    signed = None if curves is None else [sign * np.asarray(curve, np.float64) for curve in curves]
    speeds = None if signed is None else [learning_speed(curve) for curve in signed]
    before = [s[j - 1, j] for j in range(1, len(s))]
    return Summary(
        average=sign * average(s),
        negative_backward_transfer=negative_backward_transfer(s) if several else None,
        backward_transfer=backward_transfer(s) if several else None,
        max_forgetting=max_forgetting(s) if several else None,
        forward_transfer=None if speeds is None else sign * float(np.mean(speeds)),
        area_under_curve=None if speeds is None else sign * area_under_curve(s, speeds),
        zero_shot_transfer=zero_shot_transfer(s, sign * np.asarray(untrained, np.float64))
        if several and untrained is not None and np.isfinite(before).all()
        else None,
        joint_gap=None if joint is None else joint_gap(s, sign * np.asarray(joint, np.float64)),
        single_gap=None if single is None else single_gap(s, sign * np.asarray(single, np.float64)),
    )


@dataclass(frozen=True)
class Interval:
    """A share with its confidence interval."""

    share: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a success rate: stays inside 0..1, and is honest about 0 of n and n of n."""
    if trials < 1 or not 0 <= successes <= trials:
        raise UsageError(f"{successes} successes of {trials} trials have no confidence interval")
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence of {confidence} is none; give a share such as 0.95")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high)


def _learnt(scores: ArrayLike) -> Scores:
    s = np.asarray(scores, np.float64)
    if s.ndim != 2 or s.shape[0] != s.shape[1] or not s.size:
        raise UsageError(f"scores are a square of stages and tasks, not {s.shape}")
    if not np.isfinite(s[np.tril_indices(len(s))]).all():
        raise UsageError("every task must have been evaluated after its own and all later stages")
    return s


def _several(scores: ArrayLike) -> Scores:
    s = _learnt(scores)
    if len(s) < 2:
        raise UsageError("with a single stage nothing can be forgotten or transferred")
    return s
