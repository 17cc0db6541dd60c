"""LeRobot data sets (v3) as task sources. The only module of this room that imports lerobot's data sets."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.video_utils import _default_decoder_cache as _video_decoders

from kuavo_smolvla_ros.learning.sources import (
    ACTION,
    IMAGES,
    STATE,
    DataError,
    Facts,
    TaskSource,
    join,
    read_identity,
)
from kuavo_smolvla_ros.learning.stage import TaskData

THREADS = 4  # decoding at a time in one loader process: about as many as a robot has cameras
DECODERS = 64  # open files and their buffers, in one loader process
# Beginnings of names that are no hub id: nobody can be called "datasets" there.
_FOLDERS = ("~", ".", "datasets/")


class ParallelVideos(LeRobotDataset):
    """A data set whose cameras are decoded at the same time, with a bounded cache of open decoders."""

    def _query_videos(self, query_timestamps: dict[str, list[float]], ep_idx: int) -> dict[str, Any]:
        if _video_decoders.size() >= DECODERS:  # lerobot's own cache only grows
            _video_decoders.clear()
        decode = super()._query_videos
        jobs = [_threads().submit(decode, {key: times}, ep_idx) for key, times in query_timestamps.items()]
        return {key: frames for job in jobs for key, frames in job.result().items()}


@functools.cache
def _threads_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")


def _threads() -> ThreadPoolExecutor:
    return _threads_of(os.getpid())  # a fork has no threads, whatever its memory says


def open_task(task: TaskData, chunk_size: int, *, video_backend: str | None = None) -> TaskSource:
    """A task's data sets (LeRobot v3, folders or hub ids), each sample with `chunk_size` future actions."""
    return join(
        task.name, [open_lerobot(task.name, name, chunk_size, video_backend) for name in task.datasets]
    )


def open_lerobot(task: str, name: str, chunk_size: int, video_backend: str | None = None) -> TaskSource:
    """One data set by folder or hub id."""
    folder = Path(name).expanduser()
    root: Path | None = None
    if folder.is_dir():
        if not (folder / "meta" / "info.json").is_file():
            raise DataError(
                f"{folder} is no LeRobot data set (meta/info.json is missing); {task} needs one there"
            )
        root = folder.resolve()
    elif folder.is_absolute() or name.startswith(_FOLDERS) or name.count("/") != 1:
        raise DataError(
            f"the data set of {task} is not at {name}; convert recordings to there "
            "(training/convert_bags.py), or set data.root or task.datasets to where it is"
        )
    repo = root.name if root is not None else name
    try:
        meta = LeRobotDatasetMetadata(repo, root=root)
        facts = facts_of(task, name, meta)
        deltas = {ACTION: [step / meta.fps for step in range(chunk_size)]}
        # Whole, never by episodes: frame numbers then mean the same in every stage.
        dataset = ParallelVideos(repo, root=root, delta_timestamps=deltas, video_backend=video_backend)
    except (OSError, ValueError, KeyError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise DataError(
            f"the data set {name} of {task} cannot be read ({type(fault).__name__}: {reason}); is it a "
            "folder here, or a hub id that can be reached (HF_ENDPOINT)?"
        ) from fault
    lengths = [episode["length"] for episode in meta.episodes]
    episodes = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    return TaskSource(
        task,
        dataset,
        episodes,
        facts,
        meta.stats or {},
        vectors=without_pictures(dataset),
        stamp=files_stamp(Path(meta.root)),
    )


def without_pictures(dataset: LeRobotDataset) -> LeRobotDataset:
    """The same data set as if it had no camera: reading a sample then decodes nothing."""
    bare = copy.copy(dataset)
    bare.meta = copy.copy(dataset.meta)
    cameras = set(dataset.meta.camera_keys)
    features = {name: entry for name, entry in dataset.meta.info["features"].items() if name not in cameras}
    bare.meta.info = {**dataset.meta.info, "features": features}
    columns = [name for name in dataset.hf_dataset.column_names if name in cameras]
    if columns:  # pictures that are stored in the table
        bare.hf_dataset = dataset.hf_dataset.remove_columns(columns)
    return bare


def files_stamp(root: Path) -> str:
    """Names, sizes and times of a data set's files: no reading, and no change goes unseen."""
    lines = [
        f"{file.relative_to(root)} {status.st_size} {status.st_mtime_ns}"
        for file in sorted(root.rglob("*"))
        if file.is_file() and (status := file.stat())
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def facts_of(task: str, name: str, meta: Any) -> Facts:
    """What the data set's own description says."""
    absent = [key for key in (STATE, ACTION) if key not in meta.features]
    if absent:
        raise DataError(f"the data set {name} of {task} has no {' and no '.join(absent)}")
    cameras = {key.removeprefix(IMAGES): tuple(meta.features[key]["shape"][:2]) for key in meta.camera_keys}
    if not cameras:
        raise DataError(f"the data set {name} of {task} has no camera ({IMAGES}<name>)")
    identity = read_identity(Path(meta.root))
    return Facts(
        float(meta.fps),
        _names(meta.features[STATE], "state"),
        _names(meta.features[ACTION], "action"),
        cameras,
        None if identity is None else str(identity["fingerprint"]),
        {} if identity is None else _units(identity["identity"]),
    )


def _units(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: unit for what in ("state", "action") for name, unit in identity[what]}


def _names(feature: dict[str, Any], what: str) -> tuple[str, ...]:
    names = feature.get("names")
    if isinstance(names, dict):  # older data sets group them
        names = [name for group in names.values() for name in group]
    (width,) = feature["shape"]
    return tuple(names) if names and len(names) == width else tuple(f"{what}_{i}" for i in range(width))
