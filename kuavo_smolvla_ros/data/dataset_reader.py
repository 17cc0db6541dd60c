"""Looking at a LeRobot v3.0 dataset: its episodes' vectors, and single pictures of them.

Any such dataset can be read; one that this package wrote also says which recording an episode came from and
what was found in it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from kuavo_smolvla_ros.data.features import ACTION, IDENTITY, INFO, JOURNAL, PICTURES, STATE
from kuavo_smolvla_ros.data.findings import Finding
from kuavo_smolvla_ros.data.journal import Journal
from kuavo_smolvla_ros.errors import UserError

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class EpisodeView:
    """One episode without its pictures."""

    index: int
    instruction: str
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    source: str = ""
    task: str = ""
    findings: tuple[Finding, ...] = ()
    brightness: Mapping[str, float] = field(
        default_factory=dict
    )  # camera role -> mean of its pictures, 0..255

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class LeftOut:
    """A recording, or part of one, that is not in the dataset."""

    source: str
    reason: str
    findings: tuple[Finding, ...] = ()


@dataclass
class DatasetReader:
    """One dataset. Reading goes file by file, so episodes are best asked for in their order."""

    root: Path
    info: dict[str, Any]
    identity: dict[str, Any] | None
    rows: list[dict[str, Any]]
    left_out: tuple[LeftOut, ...] = ()
    _entries: list[dict[str, Any]] = field(default_factory=list)
    _table: tuple[str, pa.Table] | None = None

    @classmethod
    def open(cls, root: Path) -> DatasetReader:
        if not (root / INFO).is_file():
            raise UserError(f"{root}: there is no LeRobot dataset ({INFO} is missing)")
        info = json.loads((root / INFO).read_text())
        if info.get("codebase_version") != "v3.0":
            raise UserError(f"{root}: is of LeRobot's version {info.get('codebase_version')}, v3.0 is read")
        for name in (STATE, ACTION):
            if name not in info["features"]:
                raise UserError(f"{root}: has no {name}")
        files = sorted((root / "meta/episodes").glob("*/*.parquet"))
        rows = [row for file in files for row in _episode_rows(file)]
        identity = json.loads((root / IDENTITY).read_text()) if (root / IDENTITY).is_file() else None
        reader = cls(root, info, identity, rows)
        if (root / JOURNAL).is_file():
            reader._read_journal()
        return reader

    def _read_journal(self) -> None:
        recordings = [r for batch in Journal(self.root / JOURNAL).records for r in batch["recordings"]]
        self._entries = [entry for recording in recordings for entry in recording["episodes"]]
        self.left_out = tuple(
            LeftOut(
                rejected["source"],
                rejected["reason"],
                tuple(map(Finding.from_dict, rejected["findings"])),
            )
            for recording in recordings
            for rejected in recording["rejected"]
        )
        if len(self._entries) != len(self.rows):
            raise UserError(
                f"{self.root}: its journal knows {len(self._entries)} episodes, it holds {len(self.rows)}; "
                "something else than this package has changed it"
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def state_names(self) -> list[str]:
        return list(self.info["features"][STATE]["names"])

    @property
    def action_names(self) -> list[str]:
        return list(self.info["features"][ACTION]["names"])

    @property
    def cameras(self) -> list[str]:
        return [name for name in self.info["features"] if name.startswith(PICTURES)]

    def episode(self, index: int) -> EpisodeView:
        if not 0 <= index < len(self.rows):
            raise UserError(f"{self.root} has episodes 0..{len(self.rows) - 1}, not {index}")
        row = self.rows[index]
        columns = self._columns(row)
        entry = self._entries[index] if self._entries else {}
        return EpisodeView(
            index=index,
            instruction=row["tasks"][0],
            state=_matrix(columns, STATE),
            action=_matrix(columns, ACTION),
            source=entry.get("source", ""),
            task=entry.get("task", row["tasks"][0]),
            findings=tuple(map(Finding.from_dict, entry.get("findings", ()))),
            brightness={
                key.removeprefix(PICTURES): 255 * float(np.mean(row[f"stats/{key}/mean"]))
                for key in self.cameras
                if row.get(f"stats/{key}/mean") is not None
            },
        )

    def episodes(self) -> Iterator[EpisodeView]:
        return (self.episode(index) for index in range(len(self)))

    def pictures(self, index: int, key: str, steps: Sequence[int] | None = None) -> Iterator[Picture]:
        """The pictures of a camera (by feature name) at these steps, rising; all of them by default."""
        row = self.rows[index]
        wanted = range(row["length"]) if steps is None else steps
        if self.info["features"][key]["dtype"] == "image":
            stills = self._columns(row)[key]
            for step in wanted:
                yield np.asarray(Image.open(io.BytesIO(stills[step].as_py()["bytes"])).convert("RGB"))
            return
        path = self.root / self.info["video_path"].format(
            video_key=key,
            chunk_index=row[f"videos/{key}/chunk_index"],
            file_index=row[f"videos/{key}/file_index"],
        )
        first = round(row[f"videos/{key}/from_timestamp"] * self.fps)
        yield from _video_pictures(path, [first + step for step in wanted], self.fps)

    def _columns(self, row: dict[str, Any]) -> pa.Table:
        path = self.info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        if self._table is None or self._table[0] != path:
            self._table = (path, pq.ParquetFile(self.root / path).read())
        table = self._table[1]
        start = row["dataset_from_index"] - table["index"][0].as_py()
        return table.slice(start, row["length"])


def _episode_rows(file: Path) -> list[dict[str, Any]]:
    table = pq.ParquetFile(file).read()
    kept = [n for n in table.column_names if not n.startswith("stats/") or n.startswith(f"stats/{PICTURES}")]
    rows: list[dict[str, Any]] = table.select(kept).to_pylist()
    return rows


def _matrix(columns: pa.Table, name: str) -> NDArray[np.float32]:
    column = columns[name].combine_chunks()
    is_scalar = pa.types.is_floating(column.type)  # a vector of one is stored without its brackets
    flat = column if is_scalar else column.flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(column), -1)


def _video_pictures(path: Path, numbers: list[int], fps: float) -> Iterator[Picture]:
    """Pictures by their number in a video; far ones are sought, near ones decoded up to."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        base = stream.time_base
        assert base is not None
        decoded = container.decode(stream)
        at = -1
        for number in numbers:
            if at < 0 or not 0 < number - at < 2 * fps:
                container.seek(round(number / fps / base), stream=stream)
                decoded = container.decode(stream)
            for frame in decoded:
                assert frame.pts is not None
                at = round(frame.pts * base * fps)
                if at >= number:
                    break
            if at != number:
                raise UserError(f"{path}: has no picture number {number}")
            yield frame.to_ndarray(format="rgb24")
