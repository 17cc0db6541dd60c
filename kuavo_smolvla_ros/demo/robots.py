"""The simulated robot with smaller pictures: drawn and read fast enough for a demonstration on two cores."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.paths import config_dir

# Tasks 1 to 3 have 16 actions; task 4 walks and has 20, of which the first 16 are the same.
STANDING, WALKING = "kuavo_sim", "kuavo_mobile"
STREAMS = {"head_cam_h": "head_image", "wrist_cam_l": "left_image", "wrist_cam_r": "right_image"}


def robot_of(task: int) -> str:
    """The shipped description that a task is done with."""
    return WALKING if task == 4 else STANDING


def describe(folder: Path, height: int, width: int) -> dict[str, Path]:
    """Write both descriptions with pictures of this size; where each is, by the shipped one's name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in (STANDING, WALKING):
        lines = [f"extends: {config_dir() / 'robot' / f'{name}.yaml'}", "cameras:"]
        lines += [
            f"  {role}: {{stream: {stream}, height: {height}, width: {width}}}"
            for role, stream in STREAMS.items()
        ]
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text("\n".join(lines) + "\n")
    return paths
