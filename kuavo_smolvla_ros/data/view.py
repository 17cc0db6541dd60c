"""An episode as a rerun recording: pictures, states and actions on the episode's time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from kuavo_smolvla_ros.data.dataset_reader import DatasetReader
from kuavo_smolvla_ros.data.features import PICTURES
from kuavo_smolvla_ros.robot.images import encode_jpeg

TIMELINE = "episode_time"
_JPEG_QUALITY = 90


def log_episode(reader: DatasetReader, index: int, recording: rr.RecordingStream) -> None:
    """Log everything of one episode into a recording."""
    episode = reader.episode(index)
    seconds = np.arange(len(episode)) / reader.fps
    times = [rr.TimeColumn(TIMELINE, duration=seconds)]
    text = f"# {episode.task}\n{episode.instruction}\n\nfrom {episode.source or reader.root.name}\n"
    text += "".join(f"\n- {finding}" for finding in episode.findings if finding.data is None)
    recording.log("about", rr.TextDocument(text, media_type=rr.MediaType.MARKDOWN), static=True)
    # A joint's state and action lie in one place, so that one plot shows both.
    for what, names, values in (
        ("state", reader.state_names, episode.state),
        ("action", reader.action_names, episode.action),
    ):
        for column, name in enumerate(names):
            path = f"joints/{name}/{what}"
            recording.send_columns(
                path, times, rr.Scalars.columns(scalars=values[:, column].astype(np.float64))
            )
    for key in reader.cameras:
        role = key.removeprefix(PICTURES)
        for step, picture in enumerate(reader.pictures(index, key)):
            recording.set_time(TIMELINE, duration=float(seconds[step]))
            encoded = encode_jpeg(np.ascontiguousarray(picture), _JPEG_QUALITY)
            recording.log(f"cameras/{role}", rr.EncodedImage(contents=encoded, media_type="image/jpeg"))
    recording.send_blueprint(_blueprint(reader))


def _blueprint(reader: DatasetReader) -> Any:
    """Cameras above, each arm's joints and the rest below."""
    cameras = [key.removeprefix(PICTURES) for key in reader.cameras]
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*reader.state_names, *reader.action_names]):
        groups.setdefault(_group(name), []).append(name)
    views = [rrb.Spatial2DView(origin=f"cameras/{role}", name=role) for role in cameras]
    plots = [
        rrb.TimeSeriesView(origin="joints", contents=[f"joints/{name}/**" for name in names], name=group)
        for group, names in groups.items()
    ]
    about = rrb.TextDocumentView(origin="about", name="about")
    return rrb.Blueprint(
        rrb.Vertical(rrb.Horizontal(*views, about), rrb.Grid(*plots), row_shares=[2, 3]), collapse_panels=True
    )


def _group(name: str) -> str:
    for mark, group in (("gripper", "grippers"), ("zarm_l", "left arm"), ("zarm_r", "right arm")):
        if mark in name:
            return group
    return "base" if name.startswith("base") else "joints"


def save_episode(root: Path, index: int, target: Path) -> None:
    """Write an episode as a recording that the rerun viewer opens."""
    reader = DatasetReader.open(root)
    with rr.RecordingStream(f"{root.name} episode {index}") as recording:
        recording.save(target)
        log_episode(reader, index, recording)


def show_episode(root: Path, index: int) -> None:
    """Open the viewer on an episode."""
    reader = DatasetReader.open(root)
    with rr.RecordingStream(f"{root.name} episode {index}") as recording:
        recording.spawn()
        log_episode(reader, index, recording)
