"""Recordings in, a LeRobot dataset out: in parallel, resumable, the same bytes whatever happened on the way.

Workers make each recording ready on its own (`shard.process`); one writer takes the results in the order of
the recordings and lays them into packs in a staging folder inside the dataset (`staging.Staging`), whose
journal names what is complete. At the end everything moves into place at once (`dataset.put_in_place`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from kuavo_smolvla_ros.data.dataset import (
    Dataset,
    check_compatible,
    identity_record,
    machine_faults,
    mark_ready,
    open_dataset,
    put_in_place,
)
from kuavo_smolvla_ros.data.episode import Rejection
from kuavo_smolvla_ros.data.features import (
    IDENTITY,
    INFO,
    JOURNAL,
    STATS,
    TASKS,
    Layout,
    PictureSettings,
    data_path,
    episodes_path,
    features,
    info,
    pictures_to_dict,
)
from kuavo_smolvla_ros.data.journal import exclusive, to_line
from kuavo_smolvla_ros.data.pool import Results, Runner, in_this_process
from kuavo_smolvla_ros.data.recordings import Recording, content_hash
from kuavo_smolvla_ros.data.shard import Extract, Job, RecordingShard
from kuavo_smolvla_ros.data.staging import Staging, describe
from kuavo_smolvla_ros.data.video import VideoSettings, encoder_versions
from kuavo_smolvla_ros.data.writer import PackLimits, Position, dataset_stats, json_bytes, tasks_parquet
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.spec import load_spec

# A recording that is dealt with, and what became of it (None: an earlier run had dealt with it).
Progress = Callable[[Recording, RecordingShard | None], None]


def _silent(recording: Recording, shard: RecordingShard | None) -> None:
    pass


@dataclass(frozen=True)
class ConversionSettings:
    """What decides the dataset's bytes, besides the recordings."""

    spec: str  # a robot description by name or path
    pictures: PictureSettings = field(default_factory=VideoSettings)
    extract: Mapping[str, Any] = field(default_factory=dict)
    limits: PackLimits = field(default_factory=PackLimits)

    def fingerprint(self, layout: Layout) -> str:
        return _digest(
            {
                "identity": layout.identity,
                "features": features(layout, self.pictures),
                "pictures": pictures_to_dict(self.pictures),
                "extract": dict(self.extract),
                "limits": asdict(self.limits),
                "encoder": encoder_versions(),
            }
        )


@dataclass
class Report:
    """What a run did, and what it left out."""

    root: Path
    known: int = 0  # recordings that were in the dataset already
    resumed: int = 0  # recordings that an interrupted run had completed
    converted: int = 0  # recordings dealt with by this run
    episodes: int = 0  # new in the dataset, with those of the interrupted run
    frames: int = 0
    seconds: float = 0.0
    left_out: list[tuple[str, str]] = field(default_factory=list)  # source, reason
    tracebacks: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        left_out = [{"source": source, "reason": reason} for source, reason in self.left_out]
        return {**asdict(self), "root": str(self.root), "left_out": left_out}

    def note(self, entry: Mapping[str, Any], fps: float) -> None:
        frames = sum(episode["length"] for episode in entry["episodes"])
        self.episodes += len(entry["episodes"])
        self.frames += frames
        self.seconds += frames / fps
        self.note_left_out(entry)

    def note_shard(self, entry: Mapping[str, Any], shard: RecordingShard, fps: float) -> None:
        self.converted += 1
        self.note(entry, fps)
        if shard.traceback is not None:
            self.tracebacks[shard.name] = shard.traceback

    def note_left_out(self, entry: Mapping[str, Any]) -> None:
        folder = PurePosixPath(entry["name"]).parent
        self.left_out += [(str(folder / r["source"]), r["reason"]) for r in entry["rejected"]]
        if entry["failure"] is not None:
            self.left_out.append((entry["name"], entry["failure"]))


def convert(
    recordings: Sequence[Recording],
    root: Path,
    settings: ConversionSettings,
    extract: Extract,
    *,
    runner: Runner = in_this_process,
    camera_threads: int = 1,
    retry_rejected: bool = False,
    progress: Progress = _silent,
) -> Report:
    """Bring every recording that `root` does not hold yet into it; `root` may be new.

    Interrupted in any way and run again, the result is byte for byte that of one run without interruption.
    """
    layout = Layout.of(load_spec(settings.spec))
    work = Work(
        layout=layout,
        pictures=settings.pictures,
        limits=settings.limits,
        fingerprint=settings.fingerprint(layout),
        make=lambda spool, pending: runner(
            Job(settings.spec, extract, settings.extract, settings.pictures, spool, camera_threads), pending
        ),
        content=lambda recording: content_hash(recording.path),
    )
    return carry_out(work, recordings, root, retry_rejected=retry_rejected, progress=progress)


@dataclass(frozen=True)
class Work:
    """What is to be brought into a dataset, wherever it comes from."""

    layout: Layout
    pictures: PictureSettings
    limits: PackLimits
    fingerprint: str  # of all that decides what `make` gives, besides the recordings
    make: Callable[[Path, Sequence[Recording]], Results]  # spool folder, recordings -> shards in their order
    content: Callable[[Recording], str]


def carry_out(
    work: Work,
    recordings: Sequence[Recording],
    root: Path,
    *,
    retry_rejected: bool = False,
    progress: Progress = _silent,
) -> Report:
    """Stage what is new, and put it in place."""
    is_new = not root.exists()
    with machine_faults(root):
        root.mkdir(parents=True, exist_ok=True)
        with exclusive(root):
            put_in_place(root)
            base = open_dataset(root)
            if base is not None:
                check_compatible(base, work.layout, work.pictures)
            report = Report(root)
            kept = _kept_batches(base, recordings if retry_rejected else ())
            fresh = _select(recordings, kept, work.content, report, progress)
            if fresh or (base and kept != list(base.journal)):
                position = base.position if base else Position()
                staging = Staging(root, work.layout, work.pictures, work.limits, position)
                _stage(staging, fresh, kept, work, report, progress)
                if staging.position.episodes:
                    _finish(root, base, kept, staging, work)
                else:
                    staging.remove()
        if is_new and not any(root.iterdir()):
            root.rmdir()
    return report


def rehearse(
    recordings: Sequence[Recording],
    root: Path,
    settings: ConversionSettings,
    extract: Extract,
    *,
    runner: Runner = in_this_process,
    progress: Progress = _silent,
) -> Report:
    """What `convert` would find, short of decoding pictures; nothing is written (`--dry-run`)."""
    layout = Layout.of(load_spec(settings.spec))
    base = open_dataset(root)
    if base is not None:
        check_compatible(base, layout, settings.pictures)
    report = Report(root)
    kept = _kept_batches(base, ())
    fresh = _select(recordings, kept, lambda recording: content_hash(recording.path), report, progress)
    contents = _contents(kept)
    job = Job(settings.spec, extract, settings.extract, settings.pictures, root, encode=False)
    with contextlib.closing(runner(job, fresh)) as shards:
        for recording, shard in zip(fresh, shards, strict=True):
            report.note_shard(describe(_without_duplicates(shard, contents)), shard, layout.fps)
            progress(recording, shard)
    return report


def _kept_batches(base: Dataset | None, retried: Sequence[Recording]) -> list[dict[str, Any]]:
    """The dataset's journal, without those of `retried` that gave nothing: these are looked at again."""
    again = {recording.name for recording in retried}
    kept = []
    for batch in base.journal if base else ():
        entries = [e for e in batch["recordings"] if e["episodes"] or e["name"] not in again]
        if entries:
            kept.append({**batch, "recordings": entries})
    return kept


def _select(
    recordings: Sequence[Recording],
    kept: Sequence[Mapping[str, Any]],
    content: Callable[[Recording], str],
    report: Report,
    progress: Progress,
) -> list[Recording]:
    """The recordings the dataset does not know; one that has changed since is refused."""
    known = {entry["name"]: entry for batch in kept for entry in batch["recordings"]}
    hashes = _hash([recording for recording in recordings if recording.name in known], content)
    fresh = []
    for recording in recordings:
        entry = known.get(recording.name)
        if entry is None:
            fresh.append(recording)
            continue
        if hashes[recording.name] != entry["content"]:
            raise UserError(
                f"{recording.path} has changed since it was converted into {report.root}; "
                "give it a new name, or convert into a new folder"
            )
        report.known += 1
        report.note_left_out(entry)
        progress(recording, None)
    return fresh


def _hash(recordings: Sequence[Recording], content: Callable[[Recording], str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as threads:
        hashes = threads.map(content, recordings)
        return dict(zip((recording.name for recording in recordings), hashes, strict=True))


def _stage(
    staging: Staging,
    recordings: Sequence[Recording],
    kept: Sequence[Mapping[str, Any]],
    work: Work,
    report: Report,
    progress: Progress,
) -> None:
    """Bring all recordings into the staging folder, going on where an interrupted run ended."""
    contents = _contents(kept)
    fps = work.layout.fps
    try:
        recorded = set(staging.recorded({"work": work.fingerprint, "base": _digest(kept)}))
        hashes = _hash([recording for recording in recordings if recording.name in recorded], work.content)
        for entry in staging.resume(recordings, hashes):
            contents.setdefault(entry["content"], entry["name"])
            report.note(entry, fps)
            progress(recordings[report.resumed], None)
            report.resumed += 1
        pending = recordings[report.resumed :]
        with contextlib.closing(work.make(staging.spool, pending)) as shards:
            for recording, shard in zip(pending, shards, strict=True):
                report.note_shard(staging.add(_without_duplicates(shard, contents)), shard, fps)
                progress(recording, shard)
        staging.close_batch()
    except BaseException:
        staging.abandon()
        raise


def _finish(
    root: Path,
    base: Dataset | None,
    kept: Sequence[Mapping[str, Any]],
    staging: Staging,
    work: Work,
) -> None:
    """Compute the meta files over old and new packs, and put everything in place."""
    batches = [*kept, *(settled for batch in staging.batches if (settled := _settled(batch))["recordings"])]
    episode_files, data_files = base.pack_files() if base else ([], [])
    for number in staging.packs:
        episode_files.append(staging.staged_file(number, episodes_path(number)))
        data_files.append(staging.staged_file(number, data_path(number)))
    position = staging.position
    # Several descriptions may share one identity; the dataset keeps the name it began with.
    layout = base.layout if base is not None else work.layout
    described = features(layout, work.pictures)
    totals = position.episodes, position.frames, len(position.instructions)
    meta = {
        TASKS: tasks_parquet(position.instructions),
        STATS: json_bytes(dataset_stats(described, episode_files, data_files)),
        JOURNAL: b"".join(map(to_line, batches)),
        IDENTITY: json_bytes(identity_record(layout, work.pictures, _tasks(batches))),
        INFO: json_bytes(info(layout, work.pictures, *totals)),
    }
    mark_ready(root, staging.moves, meta)
    put_in_place(root)


def _settled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the dataset remembers it: what failed was not judged, and is tried again next time."""
    return {**batch, "recordings": [e for e in batch["recordings"] if e["failure"] is None]}


def _contents(batches: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {entry["content"]: entry["name"] for batch in batches for entry in batch["recordings"]}


def _without_duplicates(shard: RecordingShard, contents: dict[str, str]) -> RecordingShard:
    """The same bytes under another name are the same demonstration, and would count twice in training."""
    if shard.content is None:
        return shard
    twin = contents.setdefault(shard.content, shard.name)
    if twin == shard.name:
        return shard
    for episode in shard.episodes:
        for camera in episode.cameras.values():
            camera.blob.discard()
    return replace(shard, parts=(Rejection(shard.name, f"is the same recording as {twin}"),))


def _tasks(batches: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The tasks and the sentences they were demonstrated under, in order of first appearance."""
    tasks: dict[str, list[str]] = {}
    for batch in batches:
        for entry in batch["recordings"]:
            for episode in entry["episodes"]:
                sentences = tasks.setdefault(episode["task"], [])
                if episode["instruction"] not in sentences:
                    sentences.append(episode["instruction"])
    return tasks


def _digest(content: Any) -> str:
    return hashlib.sha256(to_line({"": content})).hexdigest()
