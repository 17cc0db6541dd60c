"""Episodes become the files of a LeRobot v3.0 dataset: packs that are written once, and meta files over them.

A pack is one video file per camera, one data file and one episodes file, all with the same number, holding a
run of consecutive episodes. Packs are never changed: adding to a dataset rewrites only the small meta files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.features import (
    ACTION,
    FILES_PER_CHUNK,
    STATE,
    Layout,
    PictureSettings,
    data_path,
    data_schema,
    episodes_path,
    features,
    picture_key,
    video_path,
)
from kuavo_smolvla_ros.data.journal import sync_file, sync_folder
from kuavo_smolvla_ros.data.recordings import file_hash
from kuavo_smolvla_ros.data.shard import EpisodeShard
from kuavo_smolvla_ros.data.statistics import (
    Stats,
    aggregate,
    from_lists,
    quantiles_of,
    to_lists,
    vector_stats,
)
from kuavo_smolvla_ros.data.stills import StillSettings, split_stills
from kuavo_smolvla_ros.data.video import PackedVideo, VideoSettings

STILLS_PER_ROW_GROUP = 64


@dataclass(frozen=True)
class PackLimits:
    """When a pack is full. An episode is never divided; one that exceeds a limit gets a pack of its own."""

    # LeRobot compares video times in 32 bits: beyond 1024 s their grain exceeds its tolerance of 0.1 ms.
    seconds: float = 600.0
    megabytes: float = 200.0  # of any one file


@dataclass
class Position:
    """How much there is before the next episode, and which instructions have been numbered."""

    episodes: int = 0
    frames: int = 0
    packs: int = 0
    instructions: list[str] = field(default_factory=list)

    def task_index(self, instruction: str) -> int:
        if instruction not in self.instructions:
            self.instructions.append(instruction)
        return self.instructions.index(instruction)


def staged_name(relative: str) -> str:
    """A file's name in a staged pack, which is one flat folder: fewer folders to make durable."""
    return relative.replace("/", "+")


class PackWriter:
    """Writes one pack into `folder`."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        pictures: PictureSettings,
        position: Position,
        limits: PackLimits,
    ) -> None:
        self.number = position.packs
        self.episodes = 0
        self._folder = folder
        self._relatives: list[str] = []
        self._pictures = pictures
        self._position = position
        self._limits = limits
        self._fps = layout.fps
        self._roles = tuple(layout.cameras)
        self._frames = 0
        self._bytes: dict[str, int] = dict.fromkeys(self._roles, 0)
        self._rows: list[dict[str, Any]] = []
        folder.mkdir()
        self._described = features(layout, pictures)
        self._schema = data_schema(self._described)
        self._data = pq.ParquetWriter(self._new_file(data_path(self.number)), self._schema)
        self._videos = (
            {
                role: PackedVideo(self._new_file(video_path(role, self.number)), self._fps)
                for role in self._roles
            }
            if isinstance(pictures, VideoSettings)
            else {}
        )

    def _new_file(self, relative: str) -> Path:
        self._relatives.append(relative)
        return self._folder / staged_name(relative)

    def accepts(self, shard: EpisodeShard) -> bool:
        if self.episodes == 0:
            return True
        if (self._frames + shard.length) / self._fps > self._limits.seconds:
            return False
        limit = self._limits.megabytes * 1e6
        sizes = {role: self._bytes[role] + shard.cameras[role].bytes for role in self._roles}
        largest = max(sizes.values(), default=0) if self._videos else sum(sizes.values())
        if largest > limit:
            return False
        for role, video in self._videos.items():
            with shard.cameras[role].blob.open() as source:
                if not video.accepts(source):
                    return False
        return True

    def add(self, shard: EpisodeShard) -> None:
        length = shard.length
        place = self._position
        index = self._index_columns(shard.instruction, length)
        self._write_rows(shard, index)
        row: dict[str, Any] = {
            "episode_index": place.episodes,
            "tasks": [shard.instruction],
            "length": length,
            "data/chunk_index": self.number // FILES_PER_CHUNK,
            "data/file_index": self.number % FILES_PER_CHUNK,
            "dataset_from_index": place.frames,
            "dataset_to_index": place.frames + length,
        }
        for role, video in self._videos.items():
            with shard.cameras[role].blob.open() as source:
                before = video.frames
                copied = video.append(source)
            if copied != length:
                raise ValueError(f"{shard.source}: {role} holds {copied} frames for {length} steps")
            key = f"videos/{picture_key(role)}"
            row[f"{key}/chunk_index"] = self.number // FILES_PER_CHUNK
            row[f"{key}/file_index"] = self.number % FILES_PER_CHUNK
            row[f"{key}/from_timestamp"] = before / self._fps
            row[f"{key}/to_timestamp"] = (before + length) / self._fps
        stats = {**shard.stats, **{name: vector_stats(values) for name, values in index.items()}}
        for name in self._described:
            for key, value in to_lists(stats[name]).items():
                row[f"stats/{name}/{key}"] = value
        row["meta/episodes/chunk_index"] = self.number // FILES_PER_CHUNK
        row["meta/episodes/file_index"] = self.number % FILES_PER_CHUNK
        self._rows.append(row)
        for role in self._roles:
            self._bytes[role] += shard.cameras[role].bytes
            shard.cameras[role].blob.discard()
        self.episodes += 1
        self._frames += length
        place.episodes += 1
        place.frames += length

    def _index_columns(self, instruction: str, length: int) -> dict[str, NDArray]:
        place = self._position
        steps = np.arange(length, dtype=np.int64)
        return {
            "timestamp": (steps / self._fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, place.episodes, np.int64),
            "index": steps + place.frames,
            "task_index": np.full(length, place.task_index(instruction), np.int64),
        }

    def _write_rows(self, shard: EpisodeShard, index: Mapping[str, NDArray]) -> None:
        vectors: Mapping[str, NDArray] = {STATE: shard.state, ACTION: shard.action, **index}
        if isinstance(self._pictures, VideoSettings):
            self._data.write_table(_table(self._schema, vectors, {}))
            return
        for start, stills in _stills_in_batches(shard, self._pictures):
            part = {name: values[start : start + STILLS_PER_ROW_GROUP] for name, values in vectors.items()}
            self._data.write_table(_table(self._schema, part, stills))

    def close(self) -> dict[str, Any]:
        """Finish all files and put them on the disk; return the pack's record for the journal."""
        self._data.close()
        for video in self._videos.values():
            video.close()
        rows = pa.Table.from_pylist(self._rows)
        pq.write_table(rows, self._new_file(episodes_path(self.number)))
        files = {}
        for relative in self._relatives:
            path = self._folder / staged_name(relative)
            sync_file(path)
            files[relative] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        sync_folder(self._folder)
        self._position.packs += 1
        return {"number": self.number, "episodes": self.episodes, "frames": self._frames, "files": files}

    def abandon(self) -> None:
        """Let go of the files, whatever state they are in; the folder is for the caller to remove."""
        self._data.close()
        for video in self._videos.values():
            video.abandon()


def _stills_in_batches(
    shard: EpisodeShard, pictures: StillSettings
) -> Iterator[tuple[int, dict[str, list[dict[str, Any]]]]]:
    for start in range(0, shard.length, STILLS_PER_ROW_GROUP):
        batch = {}
        for role, camera in shard.cameras.items():
            stop = min(start + STILLS_PER_ROW_GROUP, shard.length)
            with camera.blob.open() as source:
                stills = split_stills(source, camera.sizes, start, stop)
                batch[picture_key(role)] = [
                    {"bytes": data, "path": f"frame-{step:06d}{pictures.suffix}"}
                    for step, data in enumerate(stills, start)
                ]
        yield start, batch


def _table(
    schema: pa.Schema, vectors: Mapping[str, NDArray], stills: Mapping[str, Sequence[Any]]
) -> pa.Table:
    columns = []
    for column in schema:
        if column.name in stills:
            columns.append(pa.array(stills[column.name], type=column.type))
        elif pa.types.is_fixed_size_list(column.type):
            flat = pa.array(np.ascontiguousarray(vectors[column.name]).ravel(), type=column.type.value_type)
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type))
        else:
            columns.append(pa.array(vectors[column.name].ravel(), type=column.type))
    return pa.Table.from_arrays(columns, schema=schema)


def tasks_parquet(instructions: Sequence[str]) -> bytes:
    """The numbered instructions, as LeRobot keeps them."""
    buffer = io.BytesIO()
    pd.DataFrame({"task_index": range(len(instructions))}, index=list(instructions)).to_parquet(buffer)
    return buffer.getvalue()


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=4, ensure_ascii=False).encode() + b"\n"


def dataset_stats(
    described: Mapping[str, Mapping[str, Any]], episode_files: Sequence[Path], data_files: Sequence[Path]
) -> dict[str, dict[str, list]]:
    """stats.json: from the episodes' statistics; the quantiles of vectors from a count over all of them."""
    parts: dict[str, list[Stats]] = {name: [] for name in described}
    for episode in _episode_stats(episode_files):
        for name in described:
            parts[name].append(episode[name])
    result = {}
    for name, feature in described.items():
        total = aggregate(parts[name])
        if feature["dtype"] not in ("video", "image"):

            def batches(name: str = name) -> Iterable[NDArray]:
                return _column(data_files, name)

            total |= quantiles_of(batches, total["min"], total["max"])
        result[name] = to_lists(total)
    return result


def _episode_stats(files: Sequence[Path]) -> Iterator[dict[str, Stats]]:
    """Each episode's statistics by feature, out of columns named stats/FEATURE/KEY."""
    for file in files:
        reader = pq.ParquetFile(file)
        columns = [column for column in reader.schema_arrow.names if column.startswith("stats/")]
        for row in reader.read(columns=columns).to_pylist():
            episode: dict[str, dict[str, list]] = {}
            for column, value in row.items():
                _, name, key = column.split("/")
                episode.setdefault(name, {})[key] = value
            yield {name: from_lists(stats) for name, stats in episode.items()}


def _column(files: Sequence[Path], name: str) -> Iterator[NDArray]:
    for file in files:
        reader = pq.ParquetFile(file)
        for batch in reader.iter_batches(batch_size=1 << 16, columns=[name]):
            column = batch.column(0)
            flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            yield flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
