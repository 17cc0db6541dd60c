"""What a run needs to go on, in folders that are whole or not there.

`last/` holds the policy as trained so far and `training_state/`: the optimizer's moments by name, and where
the run stands. Learning rates, samples, noise and the states of random generators are functions of the
step, so the step is all there is to store of them. `steps/00000400/` are earlier ones of the same kind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kuavo_smolvla_ros.learning.sharding import full, like
from kuavo_smolvla_ros.learning.stage import LAST
from kuavo_smolvla_ros.policy.checkpoint import CheckpointError, atomic_file, read_json, write_json

STATE_FOLDER = "training_state"
PROGRESS_FILE = "progress.json"
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
EARLIER = "steps"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
GIB = 2**30


@dataclass
class Progress:
    """Where a run stands: how many steps are done, and what would be lost with the process."""

    stage_hash: str
    step: int = 0
    elapsed_s: float = 0.0
    drawn: dict[str, int] = field(default_factory=dict)  # samples per task
    best: dict[str, Any] | None = None  # the validation of the `best` folder
    frozen_sha256: str = ""  # of the frozen parameters, when the stage began
    finished: bool = False


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The moments under `<parameter>.<moment>`; nothing before the first step."""
    return {
        f"{names[parameter]}.{moment}": full(value.detach()).cpu().contiguous()
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], stored: Mapping[str, Tensor]
) -> None:
    """Put stored moments back; every trained parameter must have all of them, and no other may."""
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {f"{names[parameter]}.{moment}" for parameter in ordered for moment in MOMENTS}
    if stored and wanted != stored.keys():
        odd = sorted(wanted ^ stored.keys())
        raise CheckpointError(
            f"the stored optimizer does not fit what is trained now ({len(odd)} entries differ, first "
            f"{odd[0]}); "
            "was the freezing changed? Start the stage anew (--restart)"
        )
    content = optimizer.state_dict()
    content["state"] = {
        index: {
            moment: stored[name] if moment == "step" else like(parameter, stored[name])
            for moment, name in ((moment, f"{names[parameter]}.{moment}") for moment in MOMENTS)
        }
        for index, parameter in enumerate(ordered)
        if stored
    }
    optimizer.load_state_dict(content)


def write_state(
    folder: Path, progress: Progress, moments: Mapping[str, Tensor], average: Mapping[str, Tensor] | None
) -> None:
    """`training_state/` of a checkpoint that is being written."""
    state = folder / STATE_FOLDER
    state.mkdir()
    for name, tensors in ((OPTIMIZER_FILE, moments), (AVERAGE_FILE, average)):
        if tensors is not None:
            with atomic_file(state / name) as fresh:
                save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, fresh)
    write_json(state / PROGRESS_FILE, asdict(progress))


def read_progress(folder: Path) -> Progress:
    """Where the checkpoint in `folder` stands."""
    stored = read_json(folder / STATE_FOLDER / PROGRESS_FILE)
    try:
        return Progress(**stored)
    except TypeError as fault:
        raise CheckpointError(f"{folder}: {PROGRESS_FILE} is of another version ({fault})") from fault


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The optimizer's moments and, where one is kept, the average of the weights."""
    state = folder / STATE_FOLDER
    try:
        average = state / AVERAGE_FILE
        return load_file(state / OPTIMIZER_FILE), load_file(average) if average.is_file() else None
    except (OSError, SafetensorError) as fault:
        raise CheckpointError(f"{folder}: the training state cannot be read ({fault})") from fault


def replace_last(stage_folder: Path, fresh: Path, keep: int) -> None:
    """Make the complete folder `fresh` the `last` one; of the ones before, `keep` stay."""
    last, earlier = stage_folder / LAST, stage_folder / EARLIER
    if last.is_dir():
        earlier.mkdir(exist_ok=True)
        place = earlier / f"{read_progress(last).step:08d}"
        shutil.rmtree(place, ignore_errors=True)
        os.replace(last, place)
    # A crash here leaves no `last`, and `recover` takes the fresh one or the newest earlier one.
    os.replace(fresh, last)
    _sync(stage_folder)
    kept = sorted(earlier.iterdir()) if earlier.is_dir() else []
    for folder in kept[: len(kept) - keep]:
        shutil.rmtree(folder)


def recover(stage_folder: Path, *names: str) -> None:
    """Finish or undo what a crash interrupted, so that each named folder is there if it ever was.

    Each name's folder is replaced by two renames, between which it does not exist.
    """
    if not stage_folder.is_dir():
        return
    for name in names:
        target = stage_folder / name
        old = sorted(stage_folder.glob(f".{name}.old.*/{name}"))
        if not target.exists() and old:
            os.replace(old[-1], target)
        for pattern in (f".{name}.old.*", f".{name}.new.*"):
            for leftover in stage_folder.glob(pattern):
                shutil.rmtree(leftover)
    last, earlier = stage_folder / LAST, stage_folder / EARLIER
    if not last.exists() and earlier.is_dir():
        kept = sorted(earlier.iterdir())
        if kept:
            os.replace(kept[-1], last)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Fail before a checkpoint is begun that cannot be finished."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: a checkpoint takes {needed_bytes / GIB:.1f} GiB and {free / GIB:.1f} GiB are "
            f"free; the "
            "one before it is kept. Free some space and run the same command again"
        )


def is_low(folder: Path, min_free_gib: float) -> bool:
    """Whether less is free than the run wants to leave."""
    return shutil.disk_usage(folder).free < min_free_gib * GIB


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
