"""Where new episodes wait, complete and journaled, until all of them move into the dataset at once.

DATASET/.conversion/journal.jsonl    which recordings are done, in which packs, with the files' hashes
DATASET/.conversion/packs/000007/    a finished pack, its files under the paths they will have
DATASET/.conversion/open/000008/     the pack being written; worthless after a crash
DATASET/.conversion/spool/           very long episodes on their way from a worker to the writer
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.data.dataset import STAGING
from kuavo_smolvla_ros.data.features import Layout, PictureSettings
from kuavo_smolvla_ros.data.journal import Journal, sync_folder
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.shard import EpisodeShard, RecordingShard
from kuavo_smolvla_ros.data.video import encoder_versions
from kuavo_smolvla_ros.data.writer import PackLimits, PackWriter, Position, staged_name


class Staging:
    """The writer's side of a conversion: takes shards in order, and knows what an earlier run left."""

    def __init__(
        self,
        root: Path,
        layout: Layout,
        pictures: PictureSettings,
        limits: PackLimits,
        position: Position,
    ) -> None:
        self.folder = root / STAGING
        self.spool = self.folder / "spool"
        self.position = position
        self._layout = layout
        self._pictures = pictures
        self._limits = limits
        self._packs = self.folder / "packs"
        self._open = self.folder / "open"
        self._entries: list[dict[str, Any]] = []
        self._records: list[dict[str, Any]] = []
        self._pack: PackWriter | None = None
        self.folder.mkdir(exist_ok=True)
        for leftover in (self.spool, self._open):
            shutil.rmtree(leftover, ignore_errors=True)
            leftover.mkdir()
        self._packs.mkdir(exist_ok=True)
        self._journal = Journal(self.folder / "journal.jsonl")

    @property
    def batches(self) -> list[dict[str, Any]]:
        """What is journaled: runs of recordings with the packs that hold them."""
        return self._journal.records[1:]

    @property
    def packs(self) -> list[int]:
        return [pack["number"] for batch in self.batches for pack in batch["packs"]]

    @property
    def moves(self) -> dict[str, str]:
        """Every staged file, with its place in the dataset."""
        return {
            self.staged_file(pack["number"], relative).relative_to(self.folder).as_posix(): relative
            for batch in self.batches
            for pack in batch["packs"]
            for relative in pack["files"]
        }

    def _pack_folder(self, number: int) -> Path:
        return self._packs / f"{number:06d}"

    def staged_file(self, number: int, relative: str) -> Path:
        return self._pack_folder(number) / staged_name(relative)

    def recorded(self, start: Mapping[str, Any]) -> list[str]:
        """Names of the recordings an earlier run completed, provided it was started with the same `start`."""
        if not self._journal.records or self._journal.records[0] != start:
            self._journal.keep(0)
            self._journal.append(start)
        return [entry["name"] for batch in self.batches for entry in batch["recordings"]]

    def resume(self, recordings: Sequence[Recording], hashes: Mapping[str, str]) -> list[dict[str, Any]]:
        """Take over what this run would do the very same; remove the rest. Returns the entries taken over."""
        taken: list[dict[str, Any]] = []
        kept = 0
        for batch in self.batches:
            upcoming = recordings[len(taken) : len(taken) + len(batch["recordings"])]
            if not self._would_do_the_same(batch, upcoming, hashes):
                break
            taken += batch["recordings"]
            kept += 1
            for entry in batch["recordings"]:
                for episode in entry["episodes"]:
                    self.position.task_index(episode["instruction"])
            for pack in batch["packs"]:
                self.position.episodes += pack["episodes"]
                self.position.frames += pack["frames"]
                self.position.packs += 1
        if kept < len(self.batches):
            self._journal.keep(1 + kept)
        for folder in set(self._packs.iterdir()) - set(map(self._pack_folder, self.packs)):
            shutil.rmtree(folder)
        return taken

    def _would_do_the_same(
        self, batch: Mapping[str, Any], upcoming: Sequence[Recording], hashes: Mapping[str, str]
    ) -> bool:
        entries = batch["recordings"]
        if [recording.name for recording in upcoming] != [entry["name"] for entry in entries]:
            return False
        if any(e["failure"] is not None or e["content"] != hashes[e["name"]] for e in entries):
            return False
        return all(
            path.is_file() and path.stat().st_size == file["bytes"]
            for pack in batch["packs"]
            for path, file in (
                (self.staged_file(pack["number"], relative), file) for relative, file in pack["files"].items()
            )
        )

    def add(self, shard: RecordingShard) -> dict[str, Any]:
        """Write a recording's episodes; returns what the journal will say about it."""
        if shard.episodes and self._pack is not None and not self._pack.accepts(shard.episodes[0]):
            self.close_batch()
        for episode in shard.episodes:
            self._add_episode(episode)
        entry = describe(shard)
        self._entries.append(entry)
        return entry

    def _add_episode(self, episode: EpisodeShard) -> None:
        if self._pack is not None and not self._pack.accepts(episode):
            self._close_pack()
        if self._pack is None:
            folder = self._open / f"{self.position.packs:06d}"
            self._pack = PackWriter(folder, self._layout, self._pictures, self.position, self._limits)
        self._pack.add(episode)

    def _close_pack(self) -> None:
        if self._pack is not None:
            self._records.append({**self._pack.close(), "encoder": encoder_versions()})
            self._pack = None

    def close_batch(self) -> None:
        """Make everything so far durable. What is not journaled did not happen."""
        self._close_pack()
        if not self._entries:
            return
        for folder in sorted(self._open.iterdir()):
            folder.rename(self._packs / folder.name)
        sync_folder(self._packs)
        self._journal.append({"recordings": self._entries, "packs": self._records})
        self._entries, self._records = [], []

    def abandon(self) -> None:
        """Leave what is journaled and nothing else."""
        if self._pack is not None:
            with contextlib.suppress(OSError):  # what stopped the run (a full disk) may stop this as well
                self._pack.abandon()
        for leftover in (self._open, self.spool):
            shutil.rmtree(leftover, ignore_errors=True)
        if not self.batches:
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def describe(shard: RecordingShard) -> dict[str, Any]:
    """What the journal says about a recording."""
    return {
        "name": shard.name,
        "content": shard.content,
        "failure": shard.failure,
        "episodes": [
            {
                "source": episode.source,
                "task": episode.task,
                "instruction": episode.instruction,
                "length": episode.length,
                "start_ns": episode.start_ns,
                "findings": list(episode.findings),
            }
            for episode in shard.episodes
        ],
        "rejected": [
            {
                "source": rejection.source,
                "reason": rejection.reason,
                "findings": [finding.to_dict() for finding in rejection.findings],
            }
            for rejection in shard.rejections
        ],
    }
