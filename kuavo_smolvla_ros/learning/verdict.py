"""What validation losses mean for each task seen so far, and what to change when they are bad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any

from kuavo_smolvla_ros.data.task_file import shipped_tasks
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.stage import Stage


class Verdict(Enum):
    """The first three for earlier tasks, the last two for the stage's own."""

    WELL_RETAINED = "well retained"
    DEGRADED = "degraded"
    FORGOTTEN = "forgotten"
    LEARNT = "learnt"
    NOT_LEARNT = "not yet learnt"


_GRAVITY = (Verdict.WELL_RETAINED, Verdict.DEGRADED, Verdict.FORGOTTEN)
GOOD = frozenset({Verdict.WELL_RETAINED, Verdict.LEARNT})


@dataclass(frozen=True)
class Judgement:
    """One task after a validation; `ratio` is to its loss right after it was learnt, where that is known."""

    task: str
    loss: float
    ratio: float | None
    verdict: Verdict
    advice: str | None

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f", {self.ratio:.2f} x its loss when learnt"
        line = f"{self.task}: {self.verdict.value} (loss {self.loss:.4g}{ratio})"
        return line if self.advice is None else f"{line}. {self.advice}"

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "loss": self.loss,
            "ratio": self.ratio,
            "verdict": self.verdict.value,
            "advice": self.advice,
        }


def judge(
    stage: Stage, losses: Mapping[str, float], when_learnt: Mapping[str, float] | None = None
) -> tuple[Judgement, ...]:
    """Every task of the stage by its thresholds; `when_learnt` are losses right after each task's own stage.

    An earlier task gets the worse of what the absolute and the relative thresholds say.
    """
    when_learnt = when_learnt or {}
    absent = [name for name in stage.task_names if name not in losses]
    if absent:
        raise UserError(f"{stage.name} was not validated on {', '.join(absent)}")
    for name in stage.task_names:
        if not math.isfinite(losses[name]):
            raise UserError(f"the validation loss of {name} is {losses[name]}; nothing can be said about it")
    earlier = tuple(
        _judge_earlier(stage, task.name, losses[task.name], when_learnt.get(task.name))
        for task in stage.earlier
    )
    return (*earlier, _judge_own(stage, losses[stage.task.name]))


def _judge_earlier(stage: Stage, name: str, loss: float, reference: float | None) -> Judgement:
    limits = stage.thresholds
    verdict = _grade(loss, limits.retained_below, limits.forgotten_above)
    ratio = loss / reference if reference is not None and reference > 0 else None
    if ratio is not None and limits.retained_ratio is not None and limits.forgotten_ratio is not None:
        relative = _grade(ratio, limits.retained_ratio, limits.forgotten_ratio)
        verdict = max(verdict, relative, key=_GRAVITY.index)
    advice = None if verdict is Verdict.WELL_RETAINED else _retain(stage, name, verdict)
    return Judgement(name, loss, ratio, verdict, advice)


def _grade(value: float, retained_below: float, forgotten_above: float) -> Verdict:
    if value < retained_below:
        return Verdict.WELL_RETAINED
    return Verdict.FORGOTTEN if value > forgotten_above else Verdict.DEGRADED


def _judge_own(stage: Stage, loss: float) -> Judgement:
    name, limit = stage.task.name, stage.thresholds.own_below
    if loss < limit:
        return Judgement(name, loss, None, Verdict.LEARNT, None)
    less = f", or give earlier tasks less than {float(1 - stage.shares[-1]):g} of the batches"
    return Judgement(
        name,
        loss,
        None,
        Verdict.NOT_LEARNT,
        f"It should fall below {limit:g}: if it still falls, train longer (training.epochs above "
        f"{stage.training.epochs}){less if stage.shares[-1] < 1 else ''}; if not, let more vision layers "
        "train and look at the drift of the statistics",
    )


def _retain(stage: Stage, name: str, verdict: Verdict) -> str:
    """Which shares to try: half as much again, or twice as much, at the cost of the stage's own task."""
    shares = dict(zip(stage.task_names, stage.shares, strict=True))
    own, old = stage.task.name, shares[name]
    wanted = max(old * (2 if verdict is Verdict.FORGOTTEN else Fraction(3, 2)), Fraction(1, 10))
    # The task that is being learnt keeps at least two fifths: beyond that, replay costs more than it saves.
    wanted = min(wanted, old + max(shares[own] - Fraction(2, 5), Fraction(0)))
    parts = []
    if wanted > old:
        changed = shares | {name: wanted, own: shares[own] - (wanted - old)}
        options = _options(own, shares, changed)
        parts.append(f"raise its replay share from {_text(old)} to {_text(wanted)} ({options})")
    if stage.buffer_frames is not None:
        parts.append(f"keep more frames (replay.buffer_frames above {stage.buffer_frames})")
    parts.append(f"lower optimizer.lr (now {stage.optimizer.lr:g})")
    begin = "Train this stage again" if verdict is Verdict.FORGOTTEN else "If it does not recover"
    return f"{begin}: {', or '.join(parts)}"


def _text(share: Fraction) -> str:
    """As the command line takes it, without loss."""
    return (
        f"{float(share):g}"
        if Fraction(f"{float(share):g}") == share
        else f"{share.numerator}/{share.denominator}"
    )


def _options(own: str, shares: Mapping[str, Fraction], changed: Mapping[str, Fraction]) -> str:
    """What to write for these shares: a shipped file names shares, one of one's own may give a fraction."""
    if own in shipped_tasks():
        words = [f"replay.shares.{t}={_text(share)}" for t, share in changed.items() if share != shares[t]]
        return " ".join([f"task=tasks/{own}", *words])
    listed = ",".join(f"{task}:{_text(share)}" for task, share in changed.items())
    return f"task=FILE.yaml replay.fraction=null 'replay.shares={{{listed}}}'"
