"""A checkpoint's files: written whole or not at all, and tied to a robot and to its statistics.

config.json              the configuration, network sizes included
model.safetensors        parameters; one that is exactly representable in bfloat16 is stored so
statistics.json          what normalises state and action, with its hash
checkpoint.json          the robot's fingerprint, the hash of the statistics, the freezing plan, versions
policy_preprocessor.json, policy_postprocessor.json and their state, as lerobot reads them
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.policy.dimensions import FeatureStatistics, Statistics

CONFIG_FILE = "config.json"
STATISTICS_FILE = "statistics.json"
CHECKPOINT_FILE = "checkpoint.json"
FORMAT = 1
RECORDED_VERSIONS = ("kuavo_smolvla_ros", "lerobot", "torch", "transformers")


class CheckpointError(UserError):
    """A checkpoint is incomplete, contradicts itself, or belongs to another robot."""


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A path to write that takes the place of `file` in one step when the block ends without an error.

    A reader, or whoever looks after a crash, sees the old file or the new one, never a part.
    """
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A small file for people and programs."""
    with atomic_file(file) as fresh:
        fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """Inverse of `write_json`."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no {file.name}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as fault:
        raise CheckpointError(f"{file}: not JSON ({fault})") from fault


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `target` when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.new."))
    try:
        yield fresh
        os.chmod(fresh, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / target.name)
            os.replace(fresh, target)
            shutil.rmtree(old)
        else:
            os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def packed(tensor: Tensor) -> Tensor:
    """The tensor in bfloat16 if that loses nothing (as for every weight that came from the hub), else as
    it is.
    """
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    half = tensor.to(torch.bfloat16)
    return half if torch.equal(half.to(torch.float32), tensor) else tensor


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write parameters without loss; reading them back as float32 gives the same bits."""
    with atomic_file(file) as fresh:
        save_file({name: packed(tensor) for name, tensor in weights.items()}, fresh)


def write_statistics(folder: Path, statistics: Statistics) -> None:
    """Statistics as text; single-precision numbers survive it exactly."""
    content = {key: {"mean": feature.mean, "std": feature.std} for key, feature in sorted(statistics.items())}
    write_json(folder / STATISTICS_FILE, {"features": content, "sha256": statistics.sha256})


def read_statistics(folder: Path) -> Statistics:
    """Statistics of a checkpoint, checked against the hash stored with them and with the checkpoint."""
    stored = read_json(folder / STATISTICS_FILE)
    statistics = Statistics(
        {
            key: FeatureStatistics(tuple(feature["mean"]), tuple(feature["std"]))
            for key, feature in stored["features"].items()
        }
    )
    for file, claimed in (
        (STATISTICS_FILE, stored["sha256"]),
        (CHECKPOINT_FILE, read_json(folder / CHECKPOINT_FILE)["statistics_sha256"]),
    ):
        if statistics.sha256 != claimed:
            raise CheckpointError(
                f"{folder}: the statistics do not have the hash that {file} states; "
                "they were changed after training, and the policy would see other numbers than it learnt from"
            )
    return statistics


def write_identity(
    folder: Path, *, robot_fingerprint: str | None, statistics: Statistics, freezing: Mapping[str, Any]
) -> None:
    """The file that says whose checkpoint this is and how it was made."""
    write_json(
        folder / CHECKPOINT_FILE,
        {
            "format": FORMAT,
            "robot_fingerprint": robot_fingerprint,
            "statistics_sha256": statistics.sha256,
            "freezing": dict(freezing),
            "versions": {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS},
        },
    )


def require_robot(stored: str | None, present: str, *, what: str = "this checkpoint") -> None:
    """Fail unless a policy was made for the robot at hand."""
    if stored is None:
        raise CheckpointError(
            f"{what} does not say for which robot it was made; set robot_fingerprint to {present} when "
            f"training it, "
            "if you are sure it is this one"
        )
    if stored != present:
        raise CheckpointError(
            f"{what} was made for the robot with fingerprint {stored}, this robot's is {present}: joint "
            f"names, order, "
            "units, camera roles or rate differ (`kuavo-smolvla check` shows this robot's)"
        )


def fetch_folder(name: str | Path, **hub: Any) -> Path:
    """The local folder of a checkpoint given as a folder or as a hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"], **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as fault:
        raise CheckpointError(
            f"{name} is neither a folder here nor a checkpoint that can be fetched ({type(fault).__name__}). "
            "Give the path of a folder, fetch it beforehand into HF_HOME, or set HF_ENDPOINT to a "
            "reachable mirror"
        ) from fault
