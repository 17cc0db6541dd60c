"""Episodes on the disk: a folder of rosbag2 each, with one MCAP file of messages as they came over the wire.

A folder rather than a lone file, because the tools of ROS (`ros2 bag info`, `play`) read it on every
distribution, because task and instruction can then be looked up without opening the file, and because its
metadata.yaml, written last, tells an episode that was ended from one that was cut off. The file itself also
has task, instruction and definitions, and is read without metadata.yaml all the same.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mcap.writer import CompressionType, Writer

from kuavo_smolvla_ros.data.recording_metadata import RECORD, RecordingMetadata
from kuavo_smolvla_ros.data.task_file import find_task, is_task_path
from kuavo_smolvla_ros.errors import UserError

# A process that is killed loses what it has not handed to the system: at most this and the last batch.
FLUSH_S = 0.4
BACKLOG_BYTES = 512 * 1024 * 1024
# The first version with custom_data and the last without hashes of types, which nobody computes from Python.
ROSBAG2_VERSION = 6
NS_PER_S = 1_000_000_000
GB = 1_000_000_000


class RecordingError(UserError):
    """An episode that cannot be written, or not any further."""


@dataclass(frozen=True)
class Topic:
    """What an episode holds of one stream."""

    name: str
    type: str
    definition: str


class Received(NamedTuple):
    """One message as it came."""

    topic: int
    receive_ns: int
    publish_ns: int
    sequence: int
    data: bytes


@dataclass
class Written:
    """What is in an episode so far."""

    counts: list[int]
    first_ns: int | None = None
    last_ns: int | None = None
    bytes: int = 0

    @property
    def messages(self) -> int:
        return sum(self.counts)

    @property
    def seconds(self) -> float:
        if self.first_ns is None or self.last_ns is None:
            return 0.0
        return (self.last_ns - self.first_ns) / NS_PER_S


class Episode:
    """An episode being written, by a thread: the disk may be slow, the subscriptions may not wait for it."""

    def __init__(self, folder: Path, topics: Sequence[Topic], metadata: RecordingMetadata) -> None:
        self.folder = folder
        self.error: str | None = None
        self.written = Written([0] * len(topics))
        self._topics = tuple(topics)
        self._metadata = metadata
        self._batches: queue.SimpleQueue[Sequence[Received] | None] = queue.SimpleQueue()
        self._given_bytes = 0
        self._complete = False
        self._path = folder / f"{folder.name}_0.mcap"
        try:
            folder.mkdir(parents=True)
            self._file = self._path.open("xb", buffering=1024 * 1024)
        except OSError as error:
            raise RecordingError(f"{folder}: cannot be recorded to: {error.strerror}") from error
        self._thread = threading.Thread(target=self._work, name="episode", daemon=True)
        self._thread.start()

    def add(self, batch: Sequence[Received]) -> None:
        """Hand over what arrived, without waiting; a disk that falls far behind ends the episode."""
        if self.error is not None or not batch:
            return
        self._given_bytes += sum(len(message.data) for message in batch)
        if self.backlog_bytes > BACKLOG_BYTES:
            self.error = (
                f"the disk of {self.folder} does not keep up: {BACKLOG_BYTES // 1024**2} MiB are waiting; "
                "record to a faster one"
            )
            return
        self._batches.put(batch)

    @property
    def backlog_bytes(self) -> int:
        """What was handed over and is not yet in the file."""
        return self._given_bytes - self.written.bytes

    def finish(self) -> Written:
        """End the episode: all that was handed over is on the disk, and metadata.yaml beside it."""
        self._end()
        if self.error is None and not self._complete:
            self.error = f"{self.folder}: the episode was cut off by an error of the recorder"
        if self.error is None:
            try:
                self._write_metadata_yaml()
            except OSError as error:
                self.error = _told(self.folder, error)
        if self.error is not None:
            raise RecordingError(f"{self.error} ({self.written.messages} messages before that are readable)")
        return self.written

    def discard(self) -> None:
        """Throw the episode away."""
        self._end()
        shutil.rmtree(self.folder)

    def _end(self) -> None:
        self._batches.put(None)
        self._thread.join()

    # --- In the thread

    def _work(self) -> None:
        try:
            self._write_file()
        except OSError as error:
            self.error = _told(self.folder, error)
        finally:
            try:
                self._file.close()
            except OSError as error:
                self.error = self.error or _told(self.folder, error)

    def _write_file(self) -> None:
        # Pictures are compressed already, and a robot's processor has better things to do.
        writer = Writer(self._file, compression=CompressionType.NONE)
        writer.start(profile="ros2", library="kuavo_smolvla_ros")
        writer.add_metadata(RECORD, self._metadata.to_record())
        channels = []
        for topic in self._topics:
            schema = writer.register_schema(topic.type, "ros2msg", topic.definition.encode())
            channels.append(writer.register_channel(topic.name, "cdr", schema))
        writer.flush()
        flushed_s = time.monotonic()
        while True:
            try:
                batch = self._batches.get(timeout=FLUSH_S)
            except queue.Empty:
                batch = ()
            if batch is None:
                break
            self._write_batch(writer, channels, batch)
            if time.monotonic() - flushed_s >= FLUSH_S:
                writer.flush()
                flushed_s = time.monotonic()
        writer.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._complete = True

    def _write_batch(self, writer: Writer, channels: list[int], batch: Sequence[Received]) -> None:
        written = self.written
        for message in batch:
            channel = channels[message.topic]
            writer.add_message(
                channel, message.receive_ns, message.data, message.publish_ns, message.sequence
            )
            written.counts[message.topic] += 1
            written.bytes += len(message.data)
            first, last = written.first_ns, written.last_ns
            written.first_ns = message.receive_ns if first is None else min(first, message.receive_ns)
            written.last_ns = message.receive_ns if last is None else max(last, message.receive_ns)

    # --- Its end

    def _write_metadata_yaml(self) -> None:
        written = self.written
        start_ns = written.first_ns or 0
        span = {
            "duration": {"nanoseconds": (written.last_ns or 0) - start_ns},
            "starting_time": {"nanoseconds_since_epoch": start_ns},
            "message_count": written.messages,
        }
        information: dict[str, Any] = {
            "version": ROSBAG2_VERSION,
            "storage_identifier": "mcap",
            **span,
            "topics_with_message_count": [
                {
                    "topic_metadata": {
                        "name": topic.name,
                        "type": topic.type,
                        "serialization_format": "cdr",
                        "offered_qos_profiles": "",
                    },
                    "message_count": count,
                }
                for topic, count in zip(self._topics, written.counts, strict=True)
            ],
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [self._path.name],
            "files": [{"path": self._path.name, **span}],
            "custom_data": self._metadata.to_custom_data(),
        }
        path = self.folder / "metadata.yaml"
        part = path.with_suffix(".part")
        part.write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}, sort_keys=False))
        part.rename(path)


def _told(folder: Path, error: OSError) -> str:
    return f"{folder}: the episode was cut off: {error.strerror}"


@dataclass
class StreamWatch:
    """How one stream comes in: its rate, its longest gap, and what got lost on the way."""

    count: int = 0
    lost: int = 0
    longest_gap_s: float = 0.0
    rate_hz: float = 0.0
    heard_s: float | None = None
    """When a message was taken last, on the monotonic clock."""
    _newest_ns: int | None = None
    _sequence: int | None = None
    _rated_count: int = 0
    _rated_ns: int | None = None

    def hear(self, receive_ns: int, sequence: int, now_s: float) -> None:
        """A message arrived. `sequence` is its number among its publisher's messages."""
        self.count += 1
        self.heard_s = now_s
        if self._newest_ns is not None:
            self.longest_gap_s = max(self.longest_gap_s, (receive_ns - self._newest_ns) / NS_PER_S)
        self._newest_ns = receive_ns
        if self._sequence is not None and sequence > self._sequence:
            self.lost += sequence - self._sequence - 1
        self._sequence = sequence

    def is_silent(self, now_s: float, longer_than_s: float) -> bool:
        return self.heard_s is None or now_s - self.heard_s > longer_than_s

    def rate(self, now_ns: int) -> None:
        """Take the rate since this was last called, and a gap that still lasts."""
        if self._rated_ns is not None and now_ns > self._rated_ns:
            self.rate_hz = (self.count - self._rated_count) * NS_PER_S / (now_ns - self._rated_ns)
        self._rated_count, self._rated_ns = self.count, now_ns
        if self._newest_ns is not None:
            self.longest_gap_s = max(self.longest_gap_s, (now_ns - self._newest_ns) / NS_PER_S)

    def begin(self, now_ns: int) -> None:
        """Count from here: an episode begins."""
        self.count = self.lost = self._rated_count = 0
        self.longest_gap_s = 0.0
        self._newest_ns = self._rated_ns = now_ns


class SimClock:
    """What /clock said when a message arrived; the middleware itself only knows the wall's time."""

    KEPT = 1000  # seconds of a clock: topics are emptied one after the other, the clock last

    def __init__(self) -> None:
        self._heard: deque[int] = deque(maxlen=self.KEPT)
        self._said: deque[int] = deque(maxlen=self.KEPT)

    def note(self, heard_ns: int, said_ns: int) -> None:
        """/clock said this, heard then; in the order of hearing."""
        self._heard.append(heard_ns)
        self._said.append(said_ns)

    def at(self, wall_ns: int) -> int | None:
        """The simulated time at that moment, or at the first that is known; None before any is."""
        if not self._said:
            return None
        return self._said[max(0, bisect_right(self._heard, wall_ns) - 1)]


_NUMBERED = re.compile(r"^episode_(\d+)")


def next_folder(root: Path, task: str) -> Path:
    """Where the next episode goes: the number after the highest there."""
    there = [m for p in (root.iterdir() if root.is_dir() else ()) if (m := _NUMBERED.match(p.name))]
    number = max((int(m[1]) for m in there), default=-1) + 1
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", task).strip("_")
    return root / f"episode_{number:04d}_{plain}"


def free_gb(folder: Path) -> float:
    """What is free on the disk that the folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GB


def instruction_of(task: str) -> str | None:
    """The sentence of one of the curriculum's tasks; None for a task of one's own."""
    found = None if is_task_path(task) else find_task(task)
    return None if found is None else found.instruction
