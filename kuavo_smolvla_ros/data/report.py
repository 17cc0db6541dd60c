"""The quality report of a dataset: every episode judged, every topic summed up, and whether it passes.

`make_report` looks, `QualityReport.to_dict` is the JSON, and `report_page.render` the same for people.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.dataset_reader import DatasetReader, LeftOut
from kuavo_smolvla_ros.data.features import PICTURES
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.quality import EpisodeQuality, duplicates, judge, signature
from kuavo_smolvla_ros.data.quality_settings import QualitySettings
from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.spec import load_spec

VERDICTS = ("good", "suspect", "bad")
_THUMBNAIL_HEIGHT = 90
_SPARK_STEPS = 160
_LEAST_DEVIATION = 0.01  # below it a joint practically stood still, and shifts in units of it mean nothing
_WATCHED_HISTOGRAMS = ("interval", "latency", "age", "skew")


@dataclass
class JointStatistics:
    """One column of state or action over the whole dataset."""

    name: str
    unit: str
    lower: float
    upper: float
    low: float
    high: float
    p1: float
    p99: float
    mean: float
    deviation: float
    earlier_mean: float | None = None
    earlier_deviation: float | None = None

    @property
    def shift(self) -> float | None:
        """How far the mean is from the earlier dataset's, in that one's deviations."""
        if self.earlier_mean is None or self.earlier_deviation is None:
            return None
        return (self.mean - self.earlier_mean) / max(self.earlier_deviation, _LEAST_DEVIATION)

    def to_dict(self) -> dict[str, Any]:
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in self.__dict__.items()}
        return {**rounded, "shift": None if self.shift is None else round(self.shift, 3)}


@dataclass
class TopicSummary:
    """One topic over all recordings."""

    topic: str
    recordings: int = 0
    messages: int = 0
    declared_hz: float = 0.0
    rates_hz: list[float] = field(default_factory=list)
    jitter_ms: list[float] = field(default_factory=list)
    gap_max_ms: float = 0.0
    worst: dict[str, float] = field(default_factory=dict)  # p99 over the recordings, its largest
    histograms: dict[str, list[int]] = field(default_factory=dict)
    repeated: int = 0

    def add(self, data: dict[str, Any]) -> None:
        self.recordings += 1
        self.messages += data["count"]
        self.declared_hz = data["declared_hz"]
        if data["rate_hz"] is not None:
            self.rates_hz.append(data["rate_hz"])
        if data["jitter_ms"] is not None:
            self.jitter_ms.append(data["jitter_ms"])
        self.gap_max_ms = max(self.gap_max_ms, data["gap_max_ms"] or 0.0)
        self.repeated += data.get("repeated_pictures", 0)
        for name in _WATCHED_HISTOGRAMS:
            if name in data:
                known = self.histograms.setdefault(name, [0] * len(data[name]))
                self.histograms[name] = [a + b for a, b in zip(known, data[name], strict=True)]
            if quantiles := data.get(f"{name}_ms"):
                self.worst[name] = max(self.worst.get(name, 0.0), quantiles["p99"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class EpisodePictures:
    """What the page shows of an episode besides figures: pictures as data addresses, courses as numbers."""

    thumbnails: list[tuple[str, str, str]]  # camera, first picture, last picture
    spark: NDArray[np.float32]  # [steps, joints] of the state, scaled to 0..1 of the limits
    grippers: NDArray[np.float32]  # [steps, grippers] of the action


@dataclass
class QualityReport:
    """All that is known about a dataset."""

    root: Path
    robot: str
    fps: float
    rules: QualitySettings
    episodes: list[EpisodeQuality]
    left_out: tuple[LeftOut, ...]
    topics: list[TopicSummary]
    joints: dict[str, list[JointStatistics]]
    findings: list[Finding]  # about the dataset as a whole
    against: str | None = None
    shown: dict[int, EpisodePictures] = field(default_factory=dict)

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(episode.verdict for episode in self.episodes)

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        tasks: dict[str, dict[str, Any]] = {}
        for episode in self.episodes:
            task = tasks.setdefault(
                episode.task,
                {"episodes": 0, "seconds": 0.0, "instructions": [], **dict.fromkeys(VERDICTS, 0)},
            )
            task["episodes"] += 1
            task["seconds"] = round(task["seconds"] + episode.seconds, 3)
            task[episode.verdict] += 1
            if episode.instruction not in task["instructions"]:
                task["instructions"].append(episode.instruction)
        return tasks

    @property
    def failures(self) -> list[str]:
        """Why the report fails; empty where it passes."""
        found = []
        total = len(self.episodes)
        bad = self.verdicts["bad"]
        if total and bad / total > self.rules.bad_share:
            found.append(f"{bad} of {total} episodes are bad, allowed is a share of {self.rules.bad_share:g}")
        parts = total + len(self.left_out)
        if parts and len(self.left_out) / parts > self.rules.left_out_share:
            found.append(
                f"{len(self.left_out)} of {parts} parts of recordings were left out, allowed is a share of "
                f"{self.rules.left_out_share:g}"
            )
        found += [str(f) for f in self.findings if f.severity is Severity.ERROR]
        return found

    @property
    def all_findings(self) -> list[Finding]:
        of_episodes = [f for episode in self.episodes for f in episode.findings]
        of_left_out = [f for left in self.left_out for f in left.findings]
        return [f for f in (*self.findings, *of_left_out, *of_episodes) if f.code is not Code.STREAM]

    def to_dict(self) -> dict[str, Any]:
        return {
            "dataset": str(self.root),
            "robot": self.robot,
            "fps": self.fps,
            "passes": not self.failures,
            "failures": self.failures,
            "verdicts": {verdict: self.verdicts[verdict] for verdict in VERDICTS},
            "tasks": self.tasks,
            "episodes": [episode.to_dict() for episode in self.episodes],
            "left_out": [
                {
                    "source": left.source,
                    "reason": left.reason,
                    "findings": [f.to_dict() for f in left.findings if f.code is not Code.STREAM],
                }
                for left in self.left_out
            ],
            "topics": [topic.to_dict() for topic in self.topics],
            "joints": {what: [joint.to_dict() for joint in joints] for what, joints in self.joints.items()},
            "against": self.against,
            "findings": [f.to_dict() for f in self.findings],
            "thresholds": dict(self.rules.__dict__),
        }


def make_report(
    root: Path,
    rules: QualitySettings | None = None,
    *,
    robot: str | None = None,
    against: Path | None = None,
    pictures: int = 40,
) -> QualityReport:
    """Look at every episode of a dataset; thumbnails of at most `pictures` episodes, the worst ones first."""
    rules = rules or QualitySettings.load()
    reader = DatasetReader.open(root)
    if not len(reader):
        raise UserError(f"{root}: holds no episode")
    spec = _description(reader, robot)
    episodes, signatures, values = [], [], _Values()
    for view in reader.episodes():
        episodes.append(judge(view, spec, reader.fps, rules))
        signatures.append(signature(view.state))
        values.add(view.state, view.action)
    if rules.duplicate_distance is not None:
        _mark_duplicates(episodes, np.stack(signatures), rules.duplicate_distance)
    joints = {
        "state": values.statistics("state", spec.state_names, spec),
        "action": values.statistics("action", spec.action_names, spec),
    }
    report = QualityReport(
        root=root,
        robot=spec.name,
        fps=reader.fps,
        rules=rules,
        episodes=episodes,
        left_out=reader.left_out,
        topics=_topics(episodes, reader.left_out),
        joints=joints,
        findings=[],
        against=None if against is None else str(against),
    )
    if against is not None:
        report.findings += _compare(joints, DatasetReader.open(against), spec, rules)
    report.findings += _few(report)
    report.shown = _show(reader, report, spec, pictures)
    return report


def _description(reader: DatasetReader, robot: str | None) -> RobotSpec:
    name = robot or (reader.identity or {}).get("robot")
    if name is None:
        raise UsageError(
            f"{reader.root} does not say which robot it is of; name its description with --robot"
        )
    spec = load_spec(name)
    for what, there, here in (
        ("state", reader.state_names, spec.state_names),
        ("action", reader.action_names, spec.action_names),
    ):
        if len(there) != len(here):
            raise UserError(f"{reader.root}: {what} is {len(there)} wide, {spec.name} has {len(here)}")
    return spec


class _Values:
    """All vectors of the dataset: a million steps of 36 numbers are 144 MB."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[np.float32]]] = {"state": [], "action": []}

    def add(self, state: NDArray[np.float32], action: NDArray[np.float32]) -> None:
        self._parts["state"].append(state)
        self._parts["action"].append(action)

    def statistics(self, what: str, names: Sequence[str], spec: RobotSpec) -> list[JointStatistics]:
        values = np.concatenate(self._parts[what]).astype(np.float64)
        p1, p99 = np.percentile(values, (1, 99), axis=0)
        limits = spec.limits(names)
        return [
            JointStatistics(
                name=name,
                unit=spec.joints[name].unit,
                lower=float(limits.lower[i]),
                upper=float(limits.upper[i]),
                low=float(values[:, i].min()),
                high=float(values[:, i].max()),
                p1=float(p1[i]),
                p99=float(p99[i]),
                mean=float(values[:, i].mean()),
                deviation=float(values[:, i].std()),
            )
            for i, name in enumerate(names)
        ]


def _mark_duplicates(
    episodes: list[EpisodeQuality], signatures: NDArray[np.float32], distance: float
) -> None:
    lengths = np.array([episode.steps for episode in episodes])
    for first, second in duplicates(signatures, lengths, distance):
        episode = episodes[second]
        sentence = f"repeats episode {first} ({episodes[first].source})"
        episode.findings.append(Finding(Code.DUPLICATE, Severity.ERROR, sentence, episode.source))


def _topics(episodes: Sequence[EpisodeQuality], left_out: Sequence[LeftOut]) -> list[TopicSummary]:
    topics: dict[str, TopicSummary] = {}
    for findings in (*(e.findings for e in episodes), *(left.findings for left in left_out)):
        for finding in findings:
            if finding.code is Code.STREAM and finding.topic and finding.data is not None:
                topics.setdefault(finding.topic, TopicSummary(finding.topic)).add(dict(finding.data))
    return list(topics.values())


def _compare(
    joints: dict[str, list[JointStatistics]], earlier: DatasetReader, spec: RobotSpec, rules: QualitySettings
) -> list[Finding]:
    if (earlier.state_names, earlier.action_names) != (list(spec.state_names), list(spec.action_names)):
        raise UserError(f"{earlier.root} has other joints than {spec.name}, so they cannot be compared")
    values = _Values()
    for view in earlier.episodes():
        values.add(view.state, view.action)
    found = []
    for what, ours in joints.items():
        for joint, old in zip(ours, values.statistics(what, [j.name for j in ours], spec), strict=True):
            joint.earlier_mean, joint.earlier_deviation = old.mean, old.deviation
            shift = joint.shift
            if rules.shift is not None and shift is not None and abs(shift) > rules.shift:
                sentence = (
                    f"{what} {joint.name}: mean {joint.mean:.3f}, was {old.mean:.3f} in {earlier.root.name} "
                    f"({abs(shift):.1f} deviations apart)"
                )
                found.append(Finding(Code.SHIFTED, Severity.WARNING, sentence))
    return found


def _few(report: QualityReport) -> list[Finding]:
    least = report.rules.episodes_per_task
    if least is None:
        return []
    return [
        Finding(
            Code.FEW_EPISODES,
            Severity.WARNING,
            f"{task} has {entry['episodes']} episodes, fewer than {least:g}",
        )
        for task, entry in report.tasks.items()
        if entry["episodes"] < least
    ]


def _show(
    reader: DatasetReader, report: QualityReport, spec: RobotSpec, most: int
) -> dict[int, EpisodePictures]:
    """Pictures of the worst episodes, and of others spread over the dataset, read in the dataset's order."""
    rank = {verdict: number for number, verdict in enumerate(reversed(VERDICTS))}
    episodes = report.episodes
    spread = np.random.default_rng(0).permutation(len(episodes))  # the same ones each time
    chosen = sorted(sorted(spread.tolist(), key=lambda i: rank[episodes[i].verdict])[:most])
    limits = spec.limits(spec.state_names)
    grippers = [i for i, n in enumerate(spec.action_names) if "gripper" in spec.joints[n].group]
    shown = {}
    for index in chosen:
        view = reader.episode(index)
        at = np.unique(np.linspace(0, len(view) - 1, _SPARK_STEPS).round().astype(int))
        scaled = (view.state[at] - limits.lower) / (limits.upper - limits.lower)
        shown[index] = EpisodePictures(
            _thumbnails(reader, index, len(view) - 1), scaled.astype(np.float32), view.action[at][:, grippers]
        )
    return shown


def _thumbnails(reader: DatasetReader, index: int, last: int) -> list[tuple[str, str, str]]:
    import cv2

    found = []
    for key in reader.cameras:
        role = key.removeprefix(PICTURES)
        addresses = []
        for picture in reader.pictures(index, key, [0, last]):
            width = round(picture.shape[1] * _THUMBNAIL_HEIGHT / picture.shape[0])
            small = cv2.resize(picture, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
            data = base64.b64encode(encode_jpeg(np.ascontiguousarray(small), 75)).decode()
            addresses.append(f"data:image/jpeg;base64,{data}")
        found.append((role, addresses[0], addresses[1]))
    return found
