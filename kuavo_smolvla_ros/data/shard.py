"""One recording, made ready by a worker: vectors, encoded pictures and statistics, independent of all others.

What a worker makes of a recording depends on that recording alone, so the dataset does not depend on how many
workers there are or who is done first.
"""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from traceback import format_exc
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.episode import Episode, FrameSource, Rejection
from kuavo_smolvla_ros.data.features import PictureSettings, picture_key, whole_fps
from kuavo_smolvla_ros.data.recordings import Recording, content_hash
from kuavo_smolvla_ros.data.statistics import PictureStats, Stats, vector_stats
from kuavo_smolvla_ros.data.stills import encode_stills
from kuavo_smolvla_ros.data.video import VideoSettings, encode
from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec

Extracted = Sequence[Episode | Rejection] | Rejection
Extract = Callable[[Path, RobotSpec, Mapping[str, Any]], Extracted]

# Up to here an encoded episode of one camera travels in memory; at 10 Hz that is about ten minutes of AV1.
SPOOL_BYTES = 32 << 20


@dataclass(frozen=True)
class Blob:
    """Bytes in memory, or (a very long episode) in a file that is deleted once read."""

    data: bytes | None = None
    path: Path | None = None

    @property
    def bytes(self) -> int:
        return len(self.data or b"") if self.path is None else self.path.stat().st_size

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        if self.path is None:
            yield io.BytesIO(self.data or b"")
            return
        with self.path.open("rb") as file:
            yield file

    def discard(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class CameraShard:
    """One camera's encoded pictures; `sizes` only where they are stored one by one."""

    blob: Blob
    frames: int
    stats: Stats
    sizes: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return self.blob.bytes


@dataclass(frozen=True)
class EpisodeShard:
    source: str
    task: str
    instruction: str
    start_ns: int
    state: NDArray[np.float32]
    action: NDArray[np.float32]
    cameras: Mapping[str, CameraShard]
    stats: Mapping[str, Stats]
    findings: tuple[dict[str, Any], ...] = ()

    @property
    def length(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class RecordingShard:
    """What became of one recording. `failure`: it was our code or the machine that failed, not the data."""

    name: str
    content: str | None
    parts: tuple[EpisodeShard | Rejection, ...] = ()
    failure: str | None = None
    traceback: str | None = None

    @property
    def episodes(self) -> tuple[EpisodeShard, ...]:
        return tuple(p for p in self.parts if isinstance(p, EpisodeShard))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        return tuple(p for p in self.parts if isinstance(p, Rejection))


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know, in a form that can be sent to it."""

    spec: str  # a name or a path: descriptions are loaded where they are used
    extract: Extract
    extract_settings: Mapping[str, Any]
    pictures: PictureSettings
    spool: Path
    camera_threads: int = 1
    encode: bool = True  # without: what the recording holds, and nothing else (dry run)


# Faults of the machine that the next recording would meet as well: the run ends, to be continued.
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def process(job: Job, recording: Recording) -> RecordingShard:
    """A recording becomes episodes, or a stated reason why not; one that fails never touches another."""
    try:
        return _process(job, recording)
    except UsageError:  # wrong for every recording alike
        raise
    except (OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno in _FATAL:
            raise
        reason = f"cannot be read: {error.strerror or error}"
        return RecordingShard(recording.name, None, failure=reason, traceback=format_exc())
    except Exception as error:  # a defect of ours must not take the other recordings with it; it is reported
        reason = f"failed with {type(error).__name__}: {error}"
        return RecordingShard(recording.name, None, failure=reason, traceback=format_exc())


@lru_cache
def described_robot(spec: str) -> RobotSpec:
    """A description, read once per process: it takes as long as encoding some pictures."""
    return load_spec(spec)


def _process(job: Job, recording: Recording) -> RecordingShard:
    content = content_hash(recording.path)
    spec = described_robot(job.spec)
    try:
        extracted = job.extract(recording.path, spec, job.extract_settings)
    except UsageError:
        raise
    except UserError as error:
        extracted = Rejection(recording.name, str(error))
    parts = (extracted,) if isinstance(extracted, Rejection) else tuple(extracted)
    if not parts:
        parts = (Rejection(recording.name, "holds no episode"),)
    return RecordingShard(recording.name, content, tuple(_prepare(part, job, spec) for part in parts))


def _prepare(part: Episode | Rejection, job: Job, spec: RobotSpec) -> EpisodeShard | Rejection:
    if isinstance(part, Rejection):
        return part
    try:
        check_against_spec(part, spec)
        return make_episode_shard(part, spec, job)
    except UserError as error:  # an episode of which one picture is bad is left out, whole, and alone
        return Rejection(part.source, str(error), part.findings)


def check_against_spec(episode: Episode, spec: RobotSpec) -> None:
    """What the description promises is what the episode holds."""
    for name, vectors, names in (
        ("state", episode.state, spec.state_names),
        ("action", episode.action, spec.action_names),
    ):
        if vectors.shape[1] != len(names):
            raise ValueError(
                f"{episode.source}: {name} is {vectors.shape[1]} wide, {spec.name} has {len(names)}"
            )
    if set(episode.frames) != set(spec.cameras):
        raise ValueError(
            f"{episode.source}: cameras are {', '.join(sorted(episode.frames)) or 'none'}, "
            f"{spec.name} has {', '.join(sorted(spec.cameras))}"
        )
    if episode.fps != spec.fps:
        raise ValueError(f"{episode.source}: sampled at {episode.fps:g} fps, {spec.name} says {spec.fps:g}")


def make_episode_shard(episode: Episode, spec: RobotSpec, job: Job) -> EpisodeShard:
    cameras: dict[str, CameraShard] = {}
    if job.encode:
        with ThreadPoolExecutor(max(1, job.camera_threads)) as threads:
            pending = {
                role: threads.submit(_encode_camera, role, episode.frames[role], spec, job)
                for role in spec.cameras
            }
        try:
            cameras = {role: future.result() for role, future in pending.items()}
        except BaseException:
            for future in pending.values():
                if future.exception() is None:
                    future.result().blob.discard()
            raise
    return EpisodeShard(
        source=episode.source,
        task=episode.task,
        instruction=episode.instruction,
        start_ns=int(episode.stamps_ns[0]),
        state=episode.state,
        action=episode.action,
        cameras=cameras,
        stats={
            "observation.state": vector_stats(episode.state),
            "action": vector_stats(episode.action),
            **{picture_key(role): shard.stats for role, shard in cameras.items()},
        },
        findings=tuple(finding.to_dict() for finding in episode.findings),
    )


def _encode_camera(role: str, pictures: FrameSource, spec: RobotSpec, job: Job) -> CameraShard:
    camera = spec.cameras[role]
    size = camera.height, camera.width
    stats = PictureStats(len(pictures))
    sizes: tuple[int, ...] = ()
    try:
        with _Sink(job, len(pictures), size) as sink:
            if isinstance(job.pictures, VideoSettings):
                fps = whole_fps(spec.fps)
                count = encode(
                    pictures, sink.file, fps=fps, size=size, settings=job.pictures, observe=stats.observe
                )
            else:
                sizes = encode_stills(
                    pictures, sink.file, size=size, settings=job.pictures, observe=stats.observe
                )
                count = len(sizes)
            if count != len(pictures):
                raise ValueError(f"{role} gave {count} pictures and promised {len(pictures)}")
            return CameraShard(sink.blob(), count, stats.result(), sizes)
    except UserError as error:
        raise UserError(f"{role}: {error}") from error


class _Sink:
    """Memory for an episode of usual length, a file for a very long one; nothing stays after an error."""

    def __init__(self, job: Job, frames: int, size: tuple[int, int]) -> None:
        bytes_per_pixel = 0.02 if isinstance(job.pictures, VideoSettings) else 1.0
        self._in_memory = frames * size[0] * size[1] * bytes_per_pixel <= SPOOL_BYTES
        self._folder = job.spool

    def __enter__(self) -> _Sink:
        self.file: Any = io.BytesIO()
        if not self._in_memory:
            self.file = tempfile.NamedTemporaryFile(dir=self._folder, suffix=".spool", delete=False)
        return self

    def blob(self) -> Blob:
        if self._in_memory:
            return Blob(data=self.file.getvalue())
        self.file.flush()
        return Blob(path=Path(self.file.name))

    def __exit__(self, kind: object, *_: object) -> None:
        self.file.close()
        if kind is not None and not self._in_memory:
            Path(self.file.name).unlink(missing_ok=True)
