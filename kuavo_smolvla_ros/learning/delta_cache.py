"""What a frozen base says of a task's frames, computed once: image tokens and chunks, on the disk.

The base does not change while a delta expert is trained, and images are not varied from pass to pass, so its
outputs are the same every time and are kept exactly, in the precision they were computed in. The key of a
cache is made from all they depend on: the base's weights and settings, the data, the sentence, the noise.
With image tokens given, a training step runs neither vision nor the main expert nor their decoding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuavo_smolvla_ros.learning.feed import ListedBatches, make_loader
from kuavo_smolvla_ros.learning.mixed_dataset import FRAME, MixedDataset, Standing
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.settings import RunSettings
from kuavo_smolvla_ros.learning.sources import ACTION, STATE, DataError, TaskSource
from kuavo_smolvla_ros.learning.stage import TaskData
from kuavo_smolvla_ros.learning.validation import fixed_noise
from kuavo_smolvla_ros.policy.checkpoint import read_json, write_json
from kuavo_smolvla_ros.policy.delta_network import is_delta_name
from kuavo_smolvla_ros.policy.delta_policy import base_chunk
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.network import LM_HEAD

GIB = 2**30
META_FILE = "cache.json"
VERSION = 1
# Of the configuration, what the base's outputs depend on beside its weights.
SETTINGS = (
    "cameras",
    "chunk_size",
    "compute_dtype",
    "image_size",
    "max_action_dim",
    "num_steps",
    "pin_padding",
    "tokenizer_max_length",
    "pad_language_to",
    "vision_position_ids",
)


def base_sha256(policy: KuavoSmolVLAPolicy) -> str:
    """Hash of the base's weights, statistics and settings; the delta expert's are no part of it."""
    digest = hashlib.sha256()
    for name, parameter in policy.model.named_parameters():
        if name != LM_HEAD and not is_delta_name(name):
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    settings = {name: getattr(policy.config, name) for name in SETTINGS}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(policy.statistics.sha256.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CachedTask:
    """One task's frames; `row` says where in the arrays a frame is, -1 where it is not."""

    row: NDArray[np.int64]
    state: NDArray[np.float32]  # raw, as all the data set's own vectors
    action: NDArray[np.float32]
    past_end: NDArray[np.bool_]
    chunks: NDArray[np.float32]  # (frames, draws, steps, padded width), normalised
    tokens: NDArray[Any]  # (frames, tokens, width); bfloat16 as its bits
    half: bool

    def image_tokens(self, row: int) -> Tensor:
        stored = torch.from_numpy(np.array(self.tokens[row]))
        return stored.view(torch.bfloat16) if self.half else stored


def cache_task(
    policy: KuavoSmolVLAPolicy,
    task: TaskData,
    source: TaskSource,
    frames: NDArray[np.int64],
    preprocess: Callable[[dict[str, Any]], dict[str, Any]],
    run: RunSettings,
    folder: Path,
    *,
    standing: Standing,
    base: str,
    draws: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> CachedTask:
    """The cache of these frames of a task below `folder`: read where it is complete, made where it is not.

    The base decides what it was trained to decide in this mix: flags too that the task's own robot lacks.
    """
    content = {
        "version": VERSION,
        "base": base,
        "task": task.name,
        "sentence": task.instruction,
        "source": source.digest,
        "stats": _stats_sha256(source),
        "frames": hashlib.sha256(frames.astype("<i8").tobytes()).hexdigest(),
        "draws": draws,
        "seed": seed,
        "flags": standing.known(source),
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / f"{task.name}-{key}"
    if not (place / META_FILE).is_file():
        place.mkdir(parents=True, exist_ok=True)
        samples = MixedDataset([task], [source], standing)
        _fill(policy, samples, frames, preprocess, run, place, draws, seed, say)
        # Written last: a cache without it is not complete, and is made anew.
        write_json(place / META_FILE, content | {"half": bool(_read_half(place))})
    half = read_json(place / META_FILE)["half"]
    arrays = {
        name: np.load(place / f"{name}.npy", mmap_mode="r")
        for name in ("state", "action", "past_end", "chunks", "tokens")
    }
    row = np.full(len(source.frames), -1, np.int64)
    row[frames] = np.arange(len(frames))
    return CachedTask(row=row, half=half, **arrays)


def _stats_sha256(source: TaskSource) -> str:
    """Of the data's own statistics: data converted again have the same layout and other numbers."""
    text = json.dumps(source.stats, sort_keys=True, default=lambda value: np.asarray(value).tolist())
    return hashlib.sha256(text.encode()).hexdigest()


def _read_half(place: Path) -> bool:
    return np.load(place / "tokens.npy", mmap_mode="r").dtype == np.uint16


@torch.no_grad()
def _fill(
    policy: KuavoSmolVLAPolicy,
    samples: MixedDataset,
    frames: NDArray[np.int64],
    preprocess: Callable[[dict[str, Any]], dict[str, Any]],
    run: RunSettings,
    place: Path,
    draws: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    (task,), (source,) = samples.tasks, samples.sources
    device = next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    starts = range(0, len(frames), run.batch_size)
    batches = [[Draw(0, int(f), 0) for f in frames[s : s + run.batch_size]] for s in starts]
    arrays: dict[str, Any] = {}
    written = 0
    for raw in make_loader(samples, ListedBatches(batches), run, device):
        numbers = raw[FRAME].tolist()
        chunk_shape = (policy.config.chunk_size, policy.config.max_action_dim)
        noise, _ = fixed_noise(seed, task.name, numbers, draws, chunk_shape)
        batch = preprocess(raw)
        with policy._precision(device):
            tokens = policy.image_tokens(batch)
            context = policy.context(batch, tokens)
            chunks = torch.stack(
                [base_chunk(policy, batch, context, noise[:, draw].to(device)) for draw in range(draws)], 1
            )
        half = tokens.dtype == torch.bfloat16
        rows = {
            "state": raw[STATE],
            "action": raw[ACTION][..., : source.facts.widths[ACTION]],
            "past_end": raw[ACTION_STEP_PADDING],
            "chunks": chunks.float(),
            "tokens": tokens.view(torch.int16) if half else tokens.float(),
        }
        values = {name: value.cpu().numpy() for name, value in rows.items()}
        if half:
            values["tokens"] = values["tokens"].view(np.uint16)
        if not arrays:
            arrays = _allocate(place, values, len(frames), run.min_free_gib, task.name, say)
        for name, value in values.items():
            arrays[name][written : written + len(numbers)] = value
        written += len(numbers)
    for array in arrays.values():
        array.flush()
    policy.train(was_training)


def _allocate(
    place: Path,
    values: Mapping[str, NDArray[Any]],
    count: int,
    min_free_gib: float,
    task: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    needed = sum(value[0].nbytes for value in values.values()) * count
    free = shutil.disk_usage(place).free - min_free_gib * GIB
    if needed > free:
        raise DataError(
            f"the base's outputs for {count} frames of {task} take {needed / GIB:.1f} GiB, and "
            f"{max(free, 0) / GIB:.1f} GiB may be used at {place.parent}: set delta.cache.folder to a larger "
            "disk, or replay.buffer_frames to keep fewer frames of earlier tasks"
        )
    say(f"  the base's outputs for {count} frames of {task}: {needed / GIB:.2f} GiB at {place}")
    return {
        name: np.lib.format.open_memmap(
            place / f"{name}.npy", mode="w+", dtype=value.dtype, shape=(count, *value.shape[1:])
        )
        for name, value in values.items()
    }
