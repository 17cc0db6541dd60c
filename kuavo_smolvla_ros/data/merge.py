"""Datasets out of datasets: merged, divided, or a chosen part. No picture is encoded again.

Episodes are cut out of their video files as they lie there and go through the same writer as new recordings,
so the result is journaled, resumable and complete like any other, and knows which recordings it stands for.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.data.convert import Report, Work, carry_out
from kuavo_smolvla_ros.data.dataset import Dataset, check_compatible, open_dataset
from kuavo_smolvla_ros.data.episode import Rejection
from kuavo_smolvla_ros.data.journal import to_line
from kuavo_smolvla_ros.data.pool import Results
from kuavo_smolvla_ros.data.read_back import EpisodeReader
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.shard import EpisodeShard, RecordingShard
from kuavo_smolvla_ros.data.writer import PackLimits
from kuavo_smolvla_ros.errors import UsageError, UserError

NOT_CHOSEN = "not chosen for this part of the dataset"


def load_dataset(root: Path) -> Dataset:
    dataset = open_dataset(root)
    if dataset is None:
        raise UserError(f"{root}: there is no dataset")
    return dataset


def merge(sources: Sequence[Path], root: Path, limits: PackLimits | None = None) -> Report:
    """All episodes of all sources, in their order, in one dataset (new, or one to add to)."""
    if len(sources) < 2 and not root.exists():
        raise UsageError("a merge needs two datasets, or one and an existing one to add it to")
    datasets = [load_dataset(source) for source in sources]
    return _assemble([(d, frozenset(range(d.info["total_episodes"]))) for d in datasets], root, limits)


def subset(
    source: Path,
    root: Path,
    episodes: Iterable[int],
    reasons: Mapping[int, str] | None = None,
    limits: PackLimits | None = None,
) -> Report:
    """The chosen episodes, in the source's order; `reasons` say, in the journal, why others were left."""
    dataset = load_dataset(source)
    chosen = frozenset(episodes)
    total = dataset.info["total_episodes"]
    beyond = sorted(number for number in chosen if not 0 <= number < total)
    if beyond:
        raise UsageError(f"{source} has episodes 0..{total - 1}, not {beyond[0]}")
    if not chosen:
        raise UsageError(f"no episode of {source} was chosen")
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root} exists already; a part of a dataset needs a folder of its own")
    return _assemble([(dataset, chosen)], root, limits, reasons or {})


def choose_parts(dataset: Dataset, shares: Mapping[str, float], seed: int = 0) -> dict[str, list[int]]:
    """Divide the episodes by shares (train: 0.9, validation: 0.1), each task by itself.

    Episodes of one recording stay together: they resemble each other, and on both sides of a division they
    would make a policy look better than it is.
    """
    if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"shares must be above 0 and add up to 1, not {dict(shares)}")
    groups: dict[str, list[list[int]]] = {}
    for members in _recordings(dataset).values():
        if members:
            task = members[0][1]["task"]
            groups.setdefault(task, []).append([number for number, _ in members])
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for task in sorted(groups):
        recordings = groups[task]
        random.Random(f"{seed} {task}").shuffle(recordings)
        total = sum(map(len, recordings))
        have: Counter[str] = Counter()
        for recording in recordings:
            neediest = max(shares, key=lambda name: shares[name] * total - have[name])
            parts[neediest] += recording
            have[neediest] += len(recording)
    empty = [name for name, chosen in parts.items() if not chosen]
    if empty:
        raise UsageError(f"{dataset.root} has too few recordings: nothing is left for {', '.join(empty)}")
    return {name: sorted(chosen) for name, chosen in parts.items()}


def split(
    source: Path, roots: Mapping[str, Path], shares: Mapping[str, float], seed: int = 0
) -> dict[str, Report]:
    """Divide a dataset into several, see `choose_parts`."""
    parts = choose_parts(load_dataset(source), shares, seed)
    return {name: subset(source, roots[name], chosen) for name, chosen in parts.items()}


def _recordings(dataset: Dataset) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Each recording's episodes with their numbers in the dataset."""
    number = 0
    result = {}
    for name, entry in dataset.recordings.items():
        result[name] = list(enumerate(entry["episodes"], number))
        number += len(entry["episodes"])
    return result


@dataclass(frozen=True)
class _Origin:
    """Where a recording of the result comes from."""

    reader: EpisodeReader
    entry: Mapping[str, Any]
    episodes: Sequence[tuple[int, Mapping[str, Any]]]
    chosen: frozenset[int]


def _assemble(
    picks: Sequence[tuple[Dataset, frozenset[int]]],
    root: Path,
    limits: PackLimits | None,
    reasons: Mapping[int, str] | None = None,
) -> Report:
    first = picks[0][0]
    for dataset, _ in picks:
        if dataset.root.resolve() == root.resolve():
            raise UsageError(f"{root} cannot be made out of itself; give another folder")
        check_compatible(dataset, first.layout, first.pictures)
    origins = _origins(picks)
    recordings = [Recording(name, origin.reader.dataset.root, 0) for name, origin in origins.items()]

    def make(spool: Path, pending: Sequence[Recording]) -> Results:
        for recording in pending:
            yield _shard(recording.name, origins[recording.name], reasons or {})

    picked = [[to_line({"": d.journal}).decode(), sorted(chosen)] for d, chosen in picks]
    work = Work(
        layout=first.layout,
        pictures=first.pictures,
        limits=limits or PackLimits(),
        fingerprint=hashlib.sha256(to_line({"merge": picked})).hexdigest(),
        make=make,
        content=lambda recording: str(origins[recording.name].entry["content"]),
    )
    return carry_out(work, recordings, root)


def _origins(picks: Sequence[tuple[Dataset, frozenset[int]]]) -> dict[str, _Origin]:
    """Recordings by name; where two datasets use one name for different ones, the dataset's goes in front."""
    contents: dict[str, set[str]] = {}
    for dataset, _ in picks:
        for name, entry in dataset.recordings.items():
            contents.setdefault(name, set()).add(entry["content"])
    origins: dict[str, _Origin] = {}
    for dataset, chosen in picks:
        numbered, reader = _recordings(dataset), EpisodeReader(dataset)
        for name, entry in dataset.recordings.items():
            full = name if len(contents[name]) == 1 else f"{dataset.root.name}/{name}"
            if full in origins:
                if origins[full].entry["content"] != entry["content"]:
                    raise UserError(
                        f"two datasets called {dataset.root.name} hold different recordings called {name}; "
                        "rename the folder of one"
                    )
                continue  # the same recording in both
            origins[full] = _Origin(reader, entry, numbered[name], chosen)
    return origins


def _shard(name: str, origin: _Origin, reasons: Mapping[int, str]) -> RecordingShard:
    parts: list[EpisodeShard | Rejection] = []
    for number, episode in origin.episodes:
        if number in origin.chosen:
            parts.append(origin.reader.read(number, episode))
        else:
            parts.append(Rejection(episode["source"], reasons.get(number, NOT_CHOSEN), _past(episode)))
    parts += [Rejection(r["source"], r["reason"], _past(r)) for r in origin.entry["rejected"]]
    return RecordingShard(name, origin.entry["content"], tuple(parts))


@dataclass(frozen=True)
class _PastFinding:
    content: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.content


def _past(entry: Mapping[str, Any]) -> tuple[_PastFinding, ...]:
    return tuple(map(_PastFinding, entry["findings"]))
