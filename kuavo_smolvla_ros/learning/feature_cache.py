"""Frozen vision features of a stage's frames on the disk, computed once before the first step.

One file per task, a row per frame, mapped into memory: a loader process reads the rows of a batch and decodes
no picture. The folder's name is a hash of everything the numbers depend on (frozen weights, preprocessing,
precision), a file's name one of the data; so stages that share a frozen tower share the files, and what has
changed is never read. Rows are marked as they are written: a fill that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.learning.feed import ListedBatches, make_loader
from kuavo_smolvla_ros.learning.mixed_dataset import FRAME, MixedDataset
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sources import TaskSource
from kuavo_smolvla_ros.policy.features import Cut, frozen_features, parameters_below
from kuavo_smolvla_ros.policy.images import PIXELS
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

GIB = 2**30
STORED = {torch.float32: np.dtype("<f4"), torch.bfloat16: np.dtype("<u2")}  # numpy has no bfloat16: its bits
Preprocess = Callable[[dict[str, Any]], dict[str, Any]]


class FeatureError(UserError):
    """Stored vision features are not what they should be."""


@dataclass(frozen=True)
class FeatureFile:
    """One task's rows: (cameras, tokens, width) for each frame of its data, and which are there."""

    path: Path
    frames: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * STORED[self.dtype].itemsize

    def create(self) -> None:
        """Files of the right size; rows that are not written take no place on most disks."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, size in ((self.path, self.frames * self.row_bytes), (self._marks, self.frames)):
            with path.open("ab") as stream:
                stream.truncate(size)

    def missing(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the frames have no row yet."""
        if not self._marks.is_file():
            return frames
        marks = np.fromfile(self._marks, np.uint8)
        return frames[marks[frames] == 0]

    def write(self, frames: Sequence[int], features: Tensor) -> None:
        """Rows first, then their marks, so that a marked row is always whole."""
        rows = np.memmap(self.path, STORED[self.dtype], "r+", shape=(self.frames, *self.shape))
        for frame, row in zip(frames, features.detach().cpu().contiguous(), strict=True):
            rows[frame] = row.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else row.numpy()
        rows.flush()
        marks = np.memmap(self._marks, np.uint8, "r+", shape=(self.frames,))
        marks[list(frames)] = 1
        marks.flush()

    def read(self, frame: int) -> Tensor:
        # Read and not mapped: a map that lives on keeps every page a loader has ever touched, one made for
        # each row costs four times the reading.
        mark, row = np.zeros(1, np.uint8), np.empty(self.shape, STORED[self.dtype])
        if not (_read_into(mark, self._marks, frame) and mark[0]):
            raise FeatureError(
                f"{self.path} holds no features of frame {frame}; delete it to have it made again"
            )
        if not _read_into(row, self.path, frame):
            raise FeatureError(f"{self.path} ends before frame {frame} does; delete it to have it made again")
        features = torch.from_numpy(row)
        return features.view(torch.bfloat16) if self.dtype == torch.bfloat16 else features

    @property
    def _marks(self) -> Path:
        return self.path.with_suffix(".rows")


def _read_into(row: NDArray[Any], path: Path, number: int) -> bool:
    """Fill `row` with the row of this number in a file of such rows; whether the file holds all of it."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [memoryview(row).cast("B")], number * row.nbytes) == row.nbytes
    finally:
        os.close(file)


def features_key(policy: KuavoSmolVLAPolicy, cut: Cut, dtype: torch.dtype) -> str:
    """Sixteen hex digits of all that features depend on, except the pictures."""
    config = policy.config
    settings = [
        cut.layers,
        cut.to_tokens,
        str(dtype),
        config.image_size,
        config.vision_position_ids,
        config.cameras,
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    below = parameters_below(cut)
    for name, parameter in policy.model.named_parameters():
        if name.startswith(below):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_cache(
    policy: KuavoSmolVLAPolicy,
    manager: ReplayDatasetManager,
    samples: MixedDataset,
    preprocess: Preprocess,
    run: RunSettings,
    accelerator: Any,
    say: Callable[[str], None],
) -> MixedDataset:
    """The samples with features in the place of pictures, where that is asked for, possible and fits.

    Else the samples as they are, and a sentence about why.
    """
    # A delta expert has a cache of its own, of more than pictures.
    off = run.feature_cache == "off" or policy.config.train_delta_expert
    cut = None if off else Cut.of(policy.freezing)
    if cut is None or not (cut.to_tokens or run.feature_cache == "deep"):
        return samples
    stage = manager.stage
    wanted = {
        task.name: np.union1d(training, manager.validation_frames(task))
        for task, training in zip(stage.tasks, manager.training_frames, strict=True)
    }
    probe = _features(
        policy,
        cut,
        preprocess,
        next(iter(_loader(samples, [[Draw(0, 0, 0)]], run, accelerator))),
        accelerator,
    )
    folder = run.root / "features" / features_key(policy, cut, probe.dtype)
    files = tuple(
        FeatureFile(
            folder / f"{s.name}-{_data_key(s)}.bin", len(s.frames), tuple(probe.shape[1:]), probe.dtype
        )
        for s in manager.sources
    )
    missing = [f.missing(wanted[s.name]) for f, s in zip(files, manager.sources, strict=True)]
    needed = sum(len(frames) * f.row_bytes for f, frames in zip(files, missing, strict=True))
    run.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run.root).free - run.min_free_gib * GIB
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    if needed > free:
        say(
            f"{stage.name}: vision features are not cached: they take {needed / GIB:.1f} GiB, and "
            f"{max(free, 0) / GIB:.1f} GiB may be used at {run.root} (run.min_free_gib stays free)"
        )
        return samples
    if needed:
        count = sum(len(frames) for frames in missing)
        say(f"{stage.name}: caching vision features of {count} frames, {needed / GIB:.2f} GiB, in {folder}")
        if accelerator.is_main_process:
            for file in files:
                file.create()
        accelerator.wait_for_everyone()
        for task, (file, frames) in enumerate(zip(files, missing, strict=True)):
            mine = frames[accelerator.process_index :: accelerator.num_processes].tolist()
            batches = [
                [Draw(task, frame, 0) for frame in mine[first : first + run.batch_size]]
                for first in range(0, len(mine), run.batch_size)
            ]
            for raw in _loader(samples, batches, run, accelerator):
                numbers = raw[FRAME].tolist()
                file.write(numbers, _features(policy, cut, preprocess, raw, accelerator))
        accelerator.wait_for_everyone()
    return samples.with_features(files)


def _loader(samples: MixedDataset, batches: list[list[Draw]], run: RunSettings, accelerator: Any) -> Any:
    return make_loader(samples, ListedBatches(batches), run, accelerator.device)


@torch.no_grad()
def _features(
    policy: KuavoSmolVLAPolicy, cut: Cut, preprocess: Preprocess, raw: dict[str, Any], accelerator: Any
) -> Tensor:
    pixels = preprocess(raw)[PIXELS]
    policy.model.to(pixels.device)
    with accelerator.autocast():
        return frozen_features(policy.model, pixels, cut, policy.config.vision_position_ids)


def _data_key(source: TaskSource) -> str:
    return hashlib.sha256(f"{source.digest} {source.stamp}".encode()).hexdigest()[:16]
