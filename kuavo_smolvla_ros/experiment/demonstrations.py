"""Gathered demonstrations as a task's source for training: arrays on the disk, read in place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from kuavo_smolvla_ros.experiment.gather import ABOUT
from kuavo_smolvla_ros.learning.sources import ACTION, IMAGES, STATE, Facts, TaskSource
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING
from kuavo_smolvla_ros.robot.spec import load_spec


class Demonstrations:
    """Samples by frame: pictures by camera, state, and the next `chunk` actions of the episode."""

    def __init__(self, folder: Path, chunk: int, *, pictures: bool = True) -> None:
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        self._pictures = np.load(folder / "pictures.npy", mmap_mode="r") if pictures else None
        self._states = torch.from_numpy(np.load(folder / "states.npy"))
        self._actions = torch.from_numpy(np.load(folder / "actions.npy"))
        self.episodes = np.load(folder / "episodes.npy")
        self._ends = np.searchsorted(self.episodes, self.episodes, side="right")
        self._chunk = chunk

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, frame: int) -> Mapping[str, Any]:
        end = min(frame + self._chunk, int(self._ends[frame]))
        actions, missing = self._actions[frame:end], self._chunk - (end - frame)
        sample: dict[str, Any] = {
            STATE: self._states[frame],
            # After the end the last action holds; it carries no loss.
            ACTION: torch.cat([actions, actions[-1:].expand(missing, -1)]),
            ACTION_STEP_PADDING: pad(torch.zeros(end - frame, dtype=torch.bool), (0, missing), value=True),
        }
        if self._pictures is not None:
            for camera, picture in zip(self.about["cameras"], self._pictures[frame], strict=True):
                sample[IMAGES + camera] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        return sample


def open_demonstrations(name: str, folder: Path, chunk: int) -> TaskSource:
    """The source of the task `name`."""
    frames = Demonstrations(folder, chunk)
    told = frames.about
    spec = load_spec(robot_of(told["action_names"]))
    height, width = told["wanted"]["height"], told["wanted"]["width"]
    facts = Facts(
        spec.fps,
        spec.state_names,
        tuple(told["action_names"]),
        dict.fromkeys(told["cameras"], (height, width)),
        spec.fingerprint,
        {name: spec.joints[name].unit for name in (*spec.state_names, *spec.action_names)},
    )
    stats = {
        key: _stats(np.load(folder / f"{array}.npy"))
        for key, array in ((STATE, "states"), (ACTION, "actions"))
    }
    content = hashlib.sha256((folder / ABOUT).read_bytes()).hexdigest()
    vectors = Demonstrations(folder, chunk, pictures=False)
    return TaskSource(name, frames, frames.episodes, facts, stats, vectors=vectors, stamp=content)


def robot_of(action_names: list[str]) -> str:
    """The description of the simulated robot that has these actions."""
    return "kuavo_mobile" if len(action_names) > len(load_spec("kuavo_sim").action_names) else "kuavo_sim"


def _stats(rows: np.ndarray) -> dict[str, Any]:
    return {"mean": rows.mean(0), "std": rows.std(0), "min": rows.min(0), "max": rows.max(0)}
