"""What the numbers of an episode say about it, and which other episode it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.dataset_reader import EpisodeView
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity, worst
from kuavo_smolvla_ros.data.quality_settings import QualitySettings
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.limits import Limits

Vectors = NDArray[np.float64]
_MOST_LAG_S = 1.5
_LIMIT_MARGIN = 0.01  # of a joint's range, at its ends
_AT_POSE_RAD = 0.05
_OUTSIDE_MARGIN = 0.02  # a joint pushed against its stop reads a little beyond
_SIGNATURE_STEPS = 24


@dataclass
class EpisodeQuality:
    """One episode judged."""

    index: int
    source: str
    task: str
    instruction: str
    steps: int
    seconds: float
    figures: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        found = worst(self.findings)
        return {None: "good", Severity.INFO: "good", Severity.WARNING: "suspect", Severity.ERROR: "bad"}[
            found
        ]

    @property
    def why(self) -> str:
        """The verdict and what led to it, for who leaves the episode out."""
        worst_one = max(self.findings, key=lambda finding: finding.severity.rank, default=None)
        if worst_one is None or self.verdict == "good":
            return f"judged {self.verdict}"
        topic = f"{worst_one.topic}: " if worst_one.topic else ""
        return f"judged {self.verdict}: {topic}{worst_one.sentence}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "source": self.source,
            "task": self.task,
            "instruction": self.instruction,
            "steps": self.steps,
            "seconds": self.seconds,
            "verdict": self.verdict,
            "figures": self.figures,
            "findings": [f.to_dict() for f in self.findings if f.code is not Code.STREAM],
        }


def judge(episode: EpisodeView, spec: RobotSpec, fps: float, rules: QualitySettings) -> EpisodeQuality:
    """Figures of one episode, and findings where they pass a threshold."""
    state, action = episode.state.astype(np.float64), episode.action.astype(np.float64)
    result = EpisodeQuality(
        index=episode.index,
        source=episode.source or f"episode {episode.index}",
        task=episode.task,
        instruction=episode.instruction,
        steps=len(episode),
        seconds=round(len(episode) / fps, 3),
        figures={},
        findings=list(episode.findings),
    )
    judgement = _Judgement(result, spec, fps, rules)
    judgement.motion(state)
    judgement.commands(state, action)
    judgement.lag(state, action)
    judgement.grippers(action)
    judgement.pictures(episode)
    return result


class _Judgement:
    def __init__(self, result: EpisodeQuality, spec: RobotSpec, fps: float, rules: QualitySettings) -> None:
        self._result = result
        self._spec = spec
        self._fps = fps
        self._rules = rules

    def motion(self, state: Vectors) -> None:
        spans = np.ptp(state, axis=0)
        self._result.figures["range"] = round(float(spans.max()), 4)
        limit = self._rules.static_range
        if limit is not None and spans.max() <= limit:
            self._find(Code.STATIC, Severity.ERROR, f"no joint moves by more than {spans.max():.3f}")

    def commands(self, state: Vectors, action: Vectors) -> None:
        # Of arm joints only: a gripper is told open or closed and a base where to go, at once, and their own
        # controllers take the time it needs.
        columns = [i for i, name in enumerate(self._spec.action_names) if self._is_arm_joint(name)]
        names = [self._spec.action_names[i] for i in columns]
        speed, jump = _speeds(action[:, columns], self._spec.limits(names), self._fps)
        figures = self._result.figures
        figures["speed"] = _peak(speed, names)
        figures["acceleration"] = _peak(jump, names)
        figures["fast_share"] = _share(speed > 1)
        figures["jerky_share"] = _share(jump > 1)
        self._over(Code.FAST, "fast_share", speed, names, "the velocity limit")
        self._over(Code.JERKY, "jerky_share", jump, names, "the acceleration limit")
        for what, values, own in (
            ("state", state, self._spec.state_names),
            ("action", action, self._spec.action_names),
        ):
            self._positions(what, values, own)

    def _is_arm_joint(self, name: str) -> bool:
        return self._spec.joints[name].unit == "rad" and name in self._spec.state_names

    def _positions(self, what: str, values: Vectors, names: Sequence[str]) -> None:
        chosen = [i for i, name in enumerate(names) if self._spec.joints[name].unit == "rad"]
        if not chosen:
            return
        own = [names[i] for i in chosen]
        limits = self._spec.limits(own)
        size = limits.upper - limits.lower
        part = values[:, chosen]
        beyond = np.maximum(limits.lower - part, part - limits.upper) / size
        outside, at_limit = beyond > _OUTSIDE_MARGIN, beyond > -_LIMIT_MARGIN
        figures = self._result.figures
        figures[f"{what}_outside_share"] = _share(outside)
        figures[f"{what}_at_limit_share"] = round(float(at_limit.mean(axis=0).max()), 4)
        self._share_over(
            Code.OUT_OF_LIMITS, self._rules.outside_limits_share, outside, own, f"{what} outside its limits"
        )
        if what == "state":
            # Where the task's own ready pose has a joint, it is meant to be.
            at_limit &= np.abs(part - self._ready_pose(own)) > _AT_POSE_RAD
            self._share_over(
                Code.AT_LIMIT, self._rules.at_limit_share, at_limit, own, "state at a position limit"
            )

    def _ready_pose(self, names: Sequence[str]) -> Vectors:
        """Where the episode's task begins (`task1_ready` for `task1_moving_grasp`); nowhere if not said."""
        pose = self._spec.poses.get(f"{self._result.task.partition('_')[0]}_ready", {})
        return np.array([pose.get(name, np.inf) for name in names])

    def _share_over(
        self, code: Code, limit: float | None, marked: NDArray[np.bool_], names: Sequence[str], what: str
    ) -> None:
        shares = marked.mean(axis=0)
        if limit is None or shares.max() <= limit:
            return
        joint = int(np.argmax(shares))
        step = int(np.argmax(marked[:, joint]))
        sentence = f"{names[joint]}: {what} for {shares[joint]:.0%} of the time"
        self._find(code, Severity.WARNING, sentence, step)

    def _over(self, code: Code, share: str, ratio: Vectors, names: Sequence[str], what: str) -> None:
        limit = getattr(self._rules, share)
        found = self._result.figures[share]
        if limit is None or found <= limit:
            return
        step, joint = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
        sentence = (
            f"{found:.0%} of the steps ask for more than {what} "
            f"(up to {ratio[step, joint]:.1f} times, {names[joint]})"
        )
        self._find(code, Severity.WARNING, sentence, int(step))

    def lag(self, state: Vectors, action: Vectors) -> None:
        lag_s, agreement = action_state_lag(self._spec, state, action, self._fps)
        self._result.figures["lag_s"] = None if lag_s is None else round(lag_s, 4)
        self._result.figures["lag_agreement"] = None if agreement is None else round(agreement, 3)
        if lag_s is None:
            return
        if self._rules.lag_s is not None and lag_s > self._rules.lag_s:
            self._find(Code.LAG, Severity.WARNING, f"the state follows the action {lag_s:.2f} s later")
        if self._rules.lead_s is not None and lag_s < -self._rules.lead_s:
            sentence = f"the state moves {-lag_s:.2f} s before the action: a topic's stamps are off"
            self._find(Code.LAG, Severity.WARNING, sentence)

    def grippers(self, action: Vectors) -> None:
        columns = {
            name: i
            for i, name in enumerate(self._spec.action_names)
            if "gripper" in self._spec.joints[name].group
        }
        if not columns:
            return
        used = {name: float(np.ptp(action[:, i])) for name, i in columns.items()}
        self._result.figures["gripper_range"] = {name: round(v, 3) for name, v in used.items()}
        closings = {
            n: int(np.count_nonzero(np.diff((action[:, i] > 0.5).astype(int)) > 0))
            for n, i in columns.items()
        }
        self._result.figures["gripper_closings"] = closings
        limit = self._rules.gripper_range
        if limit is not None and max(used.values()) <= limit:
            self._find(Code.GRIPPER_UNUSED, Severity.WARNING, "no gripper is moved")

    def pictures(self, episode: EpisodeView) -> None:
        darkest = self._rules.dark_level
        self._result.figures["brightness"] = {role: round(v, 1) for role, v in episode.brightness.items()}
        for role, level in episode.brightness.items():
            if darkest is not None and level < darkest:
                sentence = f"the pictures of {role} are dark (mean brightness {level:.0f} of 255)"
                self._find(Code.DARK_PICTURES, Severity.WARNING, sentence)
        limit = self._rules.frozen_share
        for finding in episode.findings:
            if finding.code is not Code.STREAM or finding.data is None:
                continue
            repeated = finding.data.get("repeated_pictures")
            if repeated is None or limit is None:
                continue
            share = repeated / max(1, finding.data["count"] - 1)
            if share > limit:
                sentence = f"{share:.0%} of the pictures repeat the one before"
                self._find(Code.FROZEN_PICTURES, Severity.WARNING, sentence, topic=finding.topic)

    def _find(
        self, code: Code, severity: Severity, sentence: str, step: int | None = None, topic: str | None = None
    ) -> None:
        at_s = None if step is None else step / self._fps
        self._result.findings.append(
            Finding(code, severity, sentence, self._result.source, topic, None, at_s)
        )


def _speeds(values: Vectors, limits: Limits, fps: float) -> tuple[Vectors, Vectors]:
    """Velocity and acceleration between steps as shares of the limits; joints without a limit give zero."""
    speed = np.diff(values, axis=0) * fps
    jump = np.diff(speed, axis=0) * fps
    return np.abs(speed) / limits.velocity, np.abs(jump) / limits.acceleration


def _peak(ratio: Vectors, names: Sequence[str]) -> dict[str, Any] | None:
    if not ratio.size:
        return None
    step, joint = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return {"of_limit": round(float(ratio[step, joint]), 3), "joint": names[int(joint)], "step": int(step)}


def _share(marked: NDArray[np.bool_]) -> float:
    return round(float(marked.any(axis=1).mean()), 4) if marked.size else 0.0


def action_state_lag(
    spec: RobotSpec, state: Vectors, action: Vectors, fps: float
) -> tuple[float | None, float | None]:
    """By how much the state's motion follows the action's, and how well they then agree (-1..1).

    Velocities of all joints that are in both are correlated at every shift; between steps the peak is taken
    from a parabola. None where there is too little motion to tell.
    """
    shared = [n for n in spec.state_names if n in spec.action_names and spec.joints[n].unit == "rad"]
    s = np.diff(state[:, [spec.state_names.index(n) for n in shared]], axis=0)
    a = np.diff(action[:, [spec.action_names.index(n) for n in shared]], axis=0)
    shifts = np.arange(-round(0.5 * fps), round(_MOST_LAG_S * fps) + 1)
    if len(s) < 3 * len(shifts) // 2 or not shared:
        return None, None
    moving = (s.std(axis=0) > 1e-4) & (a.std(axis=0) > 1e-4)
    if not moving.any():
        return None, None
    s, a = s[:, moving] - s[:, moving].mean(axis=0), a[:, moving] - a[:, moving].mean(axis=0)
    agreement = np.array([_correlation(s, a, int(shift)) for shift in shifts])
    best = int(np.argmax(agreement))
    peak = float(agreement[best])
    if peak < 0.3:
        return None, peak
    offset = 0.0
    if 0 < best < len(shifts) - 1:
        before, after = agreement[best - 1], agreement[best + 1]
        bend = before - 2 * peak + after
        offset = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float((shifts[best] + offset) / fps), peak


def _correlation(s: Vectors, a: Vectors, shift: int) -> float:
    """Of the state `shift` steps later with the action."""
    later, earlier = (s[shift:], a[: len(a) - shift]) if shift >= 0 else (s[:shift], a[-shift:])
    norm = np.sqrt((later**2).sum() * (earlier**2).sum())
    return float((later * earlier).sum() / norm) if norm > 0 else -1.0


def signature(state: NDArray[np.float32]) -> NDArray[np.float32]:
    """The course of an episode at evenly spread steps."""
    at = np.linspace(0, len(state) - 1, _SIGNATURE_STEPS).round().astype(int)
    return state[at].ravel()


def duplicates(
    signatures: NDArray[np.float32], lengths: NDArray[np.int64], distance: float
) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of episodes of nearly equal length whose courses nowhere differ by more."""
    order = np.argsort(signatures[:, 0], kind="stable")
    sorted_first = signatures[order, 0]
    pairs = []
    for place, index in enumerate(order.tolist()):
        end = int(np.searchsorted(sorted_first, sorted_first[place] + distance, side="right"))
        others = order[place + 1 : end]
        others = others[np.abs(lengths[others] - lengths[index]) <= 1]
        if others.size:
            apart = np.abs(signatures[others] - signatures[index]).max(axis=1)
            pairs += [tuple(sorted((index, int(o)))) for o in others[apart <= distance].tolist()]
    return sorted(set(pairs))
