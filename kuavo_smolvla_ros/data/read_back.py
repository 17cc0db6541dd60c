"""Episodes out of a dataset, in the form in which a worker hands them to the writer. Nothing is decoded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.dataset import Dataset
from kuavo_smolvla_ros.data.features import ACTION, STATE, data_path, episodes_path, picture_key, video_path
from kuavo_smolvla_ros.data.shard import Blob, CameraShard, EpisodeShard
from kuavo_smolvla_ros.data.statistics import Stats, from_lists
from kuavo_smolvla_ros.data.video import VideoSettings, cut


class EpisodeReader:
    """Reads episodes of one dataset, best in their order: one pack's columns are kept in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._sizes = [pack["episodes"] for batch in dataset.journal for pack in batch["packs"]]
        self._pack: int | None = None
        self._rows: list[dict[str, Any]] = []
        self._columns: pa.Table

    def read(self, number: int, entry: Mapping[str, Any]) -> EpisodeShard:
        """Episode `number`; `entry` is what the journal says about it."""
        place = self._turn_to(number)
        row = self._rows[place]
        start = row["dataset_from_index"] - self._rows[0]["dataset_from_index"]
        columns = self._columns.slice(start, row["length"])
        stats = _stats(row)
        return EpisodeShard(
            source=entry["source"],
            task=entry["task"],
            instruction=entry["instruction"],
            start_ns=entry["start_ns"],
            state=_matrix(columns, STATE),
            action=_matrix(columns, ACTION),
            cameras={role: self._camera(role, row, columns, stats) for role in self.dataset.layout.cameras},
            stats=stats,
            findings=tuple(entry["findings"]),
        )

    def _turn_to(self, number: int) -> int:
        """Have the episode's pack at hand; returns the episode's place in it."""
        pack = first = 0
        while number >= first + self._sizes[pack]:
            first += self._sizes[pack]
            pack += 1
        if pack != self._pack:
            self._rows = pq.ParquetFile(self.dataset.root / episodes_path(pack)).read().to_pylist()
            self._columns = pq.ParquetFile(self.dataset.root / data_path(pack)).read()
            self._pack = pack
        return number - first

    def _camera(
        self, role: str, row: Mapping[str, Any], columns: pa.Table, stats: Mapping[str, Stats]
    ) -> CameraShard:
        assert self._pack is not None
        key = picture_key(role)
        if isinstance(self.dataset.pictures, VideoSettings):
            fps = self.dataset.layout.fps
            start = round(row[f"videos/{key}/from_timestamp"] * fps)
            sink = io.BytesIO()
            cut(self.dataset.root / video_path(role, self._pack), start, row["length"], sink, fps)
            return CameraShard(Blob(data=sink.getvalue()), row["length"], stats[key])
        stills = [picture["bytes"] for picture in columns[key].to_pylist()]
        return CameraShard(Blob(data=b"".join(stills)), row["length"], stats[key], tuple(map(len, stills)))


def _stats(row: Mapping[str, Any]) -> dict[str, Stats]:
    found: dict[str, dict[str, list]] = {}
    for column, value in row.items():
        if column.startswith("stats/"):
            _, name, key = column.split("/")
            found.setdefault(name, {})[key] = value
    return {name: from_lists(values) for name, values in found.items()}


def _matrix(columns: pa.Table, name: str) -> NDArray[np.float32]:
    column = columns[name].combine_chunks()
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), -1).astype(np.float32)
