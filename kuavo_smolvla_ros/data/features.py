"""How a LeRobot v3.0 dataset of a described robot is laid out: names, paths, columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from kuavo_smolvla_ros.data.stills import StillSettings
from kuavo_smolvla_ros.data.video import VideoSettings, video_info
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.spec import RobotSpec

PictureSettings = VideoSettings | StillSettings

VERSION = "v3.0"
FILES_PER_CHUNK = 1000
STATE, ACTION = "observation.state", "action"
PICTURES = "observation.images."
INDEX_COLUMNS = {  # LeRobot's own, in its order
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
IDENTITY = "meta/kuavo.json"
JOURNAL = "meta/kuavo_journal.jsonl"


def picture_key(role: str) -> str:
    return PICTURES + role


def whole_fps(fps: float) -> int:
    if fps != int(fps):
        raise UserError(f"LeRobot datasets have a whole number of frames per second, not {fps:g}")
    return int(fps)


def file_name(number: int) -> str:
    return f"chunk-{number // FILES_PER_CHUNK:03d}/file-{number % FILES_PER_CHUNK:03d}"


def data_path(number: int) -> str:
    return f"data/{file_name(number)}.parquet"


def episodes_path(number: int) -> str:
    return f"meta/episodes/{file_name(number)}.parquet"


def video_path(role: str, number: int) -> str:
    return f"videos/{picture_key(role)}/{file_name(number)}.mp4"


@dataclass(frozen=True)
class Layout:
    """What a dataset takes over from the robot's description."""

    robot: str
    fps: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]]  # role -> height, width
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, spec: RobotSpec) -> Layout:
        cameras = {role: (camera.height, camera.width) for role, camera in spec.cameras.items()}
        return cls(
            spec.name, whole_fps(spec.fps), spec.state_names, spec.action_names, cameras, spec.identity
        )


def features(layout: Layout, pictures: PictureSettings) -> dict[str, dict[str, Any]]:
    """info.json's description of every feature."""
    result: dict[str, dict[str, Any]] = {
        STATE: {"dtype": "float32", "shape": [len(layout.state_names)], "names": list(layout.state_names)},
        ACTION: {"dtype": "float32", "shape": [len(layout.action_names)], "names": list(layout.action_names)},
    }
    for role, size in layout.cameras.items():
        entry: dict[str, Any] = {
            "dtype": "video" if isinstance(pictures, VideoSettings) else "image",
            "shape": [*size, 3],
            "names": ["height", "width", "channels"],
        }
        if isinstance(pictures, VideoSettings):
            entry["info"] = video_info(pictures, size, layout.fps)
        result[picture_key(role)] = entry
    for name, dtype in INDEX_COLUMNS.items():
        result[name] = {"dtype": dtype, "shape": [1], "names": None}
    return result


def data_schema(described: dict[str, dict[str, Any]]) -> pa.Schema:
    """The data files' columns, with the note by which `datasets` knows their types again."""
    columns: list[pa.Field] = []
    notes: dict[str, Any] = {}
    for name, feature in described.items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            columns.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            notes[name] = {"_type": "Image"}
            continue
        value = {"dtype": feature["dtype"], "_type": "Value"}
        scalar = pa.type_for_alias(feature["dtype"])
        if feature["shape"] == [1]:
            columns.append(pa.field(name, scalar))
            notes[name] = value
        else:
            (width,) = feature["shape"]
            columns.append(pa.field(name, pa.list_(scalar, width)))
            notes[name] = {"feature": value, "length": width, "_type": "List"}
    note = json.dumps({"info": {"features": notes}}).encode()
    return pa.schema(columns, metadata={b"huggingface": note})


def info(layout: Layout, pictures: PictureSettings, episodes: int, frames: int, tasks: int) -> dict[str, Any]:
    """info.json, key by key as LeRobot writes it."""
    is_video = isinstance(pictures, VideoSettings)
    return {
        "codebase_version": VERSION,
        "robot_type": layout.robot,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": layout.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if is_video
        else None,
        "features": features(layout, pictures),
    }


def pictures_to_dict(pictures: PictureSettings) -> dict[str, Any]:
    return {"kind": "video" if isinstance(pictures, VideoSettings) else "images", **asdict(pictures)}


def pictures_from_dict(given: dict[str, Any]) -> PictureSettings:
    rest = {key: value for key, value in given.items() if key != "kind"}
    return VideoSettings(**rest) if given["kind"] == "video" else StillSettings(**rest)
