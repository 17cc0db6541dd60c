"""A dataset of ours on the disk: what it says about itself, and how a finished change is put in place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from kuavo_smolvla_ros.data.features import (
    ACTION,
    IDENTITY,
    INFO,
    JOURNAL,
    PICTURES,
    STATE,
    TASKS,
    Layout,
    PictureSettings,
    data_path,
    episodes_path,
    features,
    pictures_from_dict,
    pictures_to_dict,
)
from kuavo_smolvla_ros.data.journal import Journal, sync_folder, write_durably
from kuavo_smolvla_ros.data.writer import Position
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import fingerprint, identity_difference

STAGING = ".conversion"
_READY = "ready.json"  # written when everything staged is complete; from then on a change only goes forward


@dataclass(frozen=True)
class Dataset:
    """The meta files of a dataset that this converter wrote."""

    root: Path
    info: Mapping[str, Any]
    identity: Mapping[str, Any]
    journal: tuple[dict[str, Any], ...]
    instructions: tuple[str, ...]

    @property
    def pictures(self) -> PictureSettings:
        return pictures_from_dict(self.identity["pictures"])

    @property
    def layout(self) -> Layout:
        described = self.info["features"]
        return Layout(
            robot=self.info["robot_type"],
            fps=self.info["fps"],
            state_names=tuple(described[STATE]["names"]),
            action_names=tuple(described[ACTION]["names"]),
            cameras={
                name.removeprefix(PICTURES): tuple(feature["shape"][:2])
                for name, feature in described.items()
                if name.startswith(PICTURES)
            },
            identity=self.identity["identity"],
        )

    @property
    def packs(self) -> int:
        return sum(len(batch["packs"]) for batch in self.journal)

    @property
    def recordings(self) -> dict[str, dict[str, Any]]:
        """Every recording that was looked at, by name, with what became of it."""
        return {entry["name"]: entry for batch in self.journal for entry in batch["recordings"]}

    @property
    def position(self) -> Position:
        return Position(
            self.info["total_episodes"], self.info["total_frames"], self.packs, list(self.instructions)
        )

    def pack_files(self) -> tuple[list[Path], list[Path]]:
        """The episodes files and the data files."""
        numbers = range(self.packs)
        return (
            [self.root / episodes_path(number) for number in numbers],
            [self.root / data_path(number) for number in numbers],
        )


def read_identity(root: Path) -> dict[str, Any]:
    """The robot a dataset was recorded on: name, fingerprint, identity, tasks with their instructions."""
    path = root / IDENTITY
    if not path.is_file():
        raise UserError(f"{root} is no dataset of this package ({IDENTITY} is missing)")
    return json.loads(path.read_text())


def open_dataset(root: Path) -> Dataset | None:
    """The dataset in `root`; None where there is nothing yet."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; give a folder for the dataset")
    if not root.exists() or not [p for p in root.iterdir() if p.name != STAGING]:
        return None
    identity = read_identity(root)
    info = json.loads((root / INFO).read_text())
    journal = tuple(Journal(root / JOURNAL).records)
    instructions = tuple(str(name) for name in pd.read_parquet(root / TASKS).index)
    dataset = Dataset(root, info, identity, journal, instructions)
    written = sum(pack["episodes"] for batch in journal for pack in batch["packs"])
    if written != info["total_episodes"]:
        raise UserError(
            f"{root} holds {info['total_episodes']} episodes, of which this converter wrote {written}; "
            "convert into a folder of its own and merge"
        )
    return dataset


def check_compatible(dataset: Dataset, layout: Layout, pictures: PictureSettings) -> None:
    """Refuse to mix in one dataset what no policy could learn together."""
    difference = identity_difference(layout.identity, dataset.identity["identity"])
    if difference:
        raise UserError(f"{dataset.root} was made for another robot description: {difference}")
    ours, theirs = pictures_to_dict(pictures), dataset.identity["pictures"]
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{dataset.root} stores pictures with {key} {theirs.get(key)}, asked for is {ours.get(key)}; "
                "use the dataset's own setting, or another folder"
            )
    described = features(layout, pictures)
    for name, feature in dataset.info["features"].items():
        if feature["shape"] != described[name]["shape"]:
            raise UserError(
                f"{dataset.root}: {name} is {feature['shape']} there and {described[name]['shape']} here"
            )


def identity_record(
    layout: Layout, pictures: PictureSettings, tasks: Mapping[str, list[str]]
) -> dict[str, Any]:
    """meta/kuavo.json."""
    return {
        "robot": layout.robot,
        "fingerprint": fingerprint(layout.identity),
        "identity": layout.identity,
        "tasks": dict(tasks),
        "pictures": pictures_to_dict(pictures),
    }


def put_in_place(root: Path) -> bool:
    """Move a complete staged change into the dataset; does nothing where none is complete.

    Moving is by renames within one file system and can be repeated, so a crash in the middle of it is mended
    by the next run, whatever that run was asked to do.
    """
    staging = root / STAGING
    ready = staging / _READY
    if not ready.exists():
        return False
    changed = {root}
    for origin, relative in json.loads(ready.read_text()):
        source, target = staging / origin, root / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        changed |= {root / parent for parent in PurePath(relative).parents}
        if source.exists():
            os.replace(source, target)
    for folder in sorted(changed):
        sync_folder(folder)
    shutil.rmtree(staging)
    return True


def mark_ready(root: Path, moves: Mapping[str, str], meta: Mapping[str, bytes]) -> None:
    """Stage the meta files and declare the change complete.

    `moves`: from where in the staging folder to where in the dataset, in this order; meta files come last.
    """
    staging = root / STAGING
    staged = list(moves.items())
    for relative, content in meta.items():
        origin = relative.replace("/", "+")
        write_durably(staging / origin, content)
        staged.append((origin, relative))
    write_durably(staging / _READY, json.dumps(staged).encode())


@contextmanager
def machine_faults(root: Path) -> Iterator[None]:
    """The disk's and the system's refusals, as one sentence each."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = (
                error.strerror if error.filename == tempfile.gettempdir() else f"no space is left for {root}"
            )
            raise UserError(
                f"{what}; what is done is kept: free some and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            place = error.filename or root
            raise UserError(f"no permission for {place}; ask its owner, or choose another folder") from error
        raise
