"""What was compressed is decompressed once, for all who read it, and leaves nothing behind."""

from __future__ import annotations

import bz2
import errno
import gc
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.data import bag_ros1, bags
from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.episode import Episode
from kuavo_smolvla_ros.data.episodes import extract
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic_bags import events, light, write
from kuavo_smolvla_ros.data.unpacked import Unpacked
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.spec import load_spec

SPEC = light(load_spec("kuavo_sim_bag"))
SIM = light(load_spec("kuavo_sim"))
RULES = {"task": "task1_moving_grasp", "instruction": "Do it", "min_episode_s": 0.5, "trim_idle": False}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, seen by nobody else."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def pictures_of(path: Path, spec: Any) -> list[bytes]:
    """All pictures of all cameras, each camera in a thread of its own."""
    (episode,) = extract(path, spec, RULES)
    assert isinstance(episode, Episode)

    def read(role: str) -> list[bytes]:
        return [picture.tobytes() for picture in episode.frames[role]]

    with ThreadPoolExecutor(3) as threads:
        return [picture for camera in threads.map(read, episode.frames) for picture in camera]


def test_a_chunk_is_decompressed_once_for_stamps_values_and_all_cameras(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = events(SPEC, 1.5, is_ros1=True)
    plain = pictures_of(write(tmp_path / "plain.bag", SPEC, happened, "bag"), SPEC)
    path = write(tmp_path / "packed.bag", SPEC, happened, "bag-bz2")
    seen: list[bytes] = []

    class Counted:
        @staticmethod
        def decompress(data: bytes) -> bytes:
            seen.append(bytes(data[-40:]))
            return bz2.decompress(data)

    monkeypatch.setattr(bag_ros1, "bz2", Counted)
    assert pictures_of(path, SPEC) == plain
    assert len(seen) == len(set(seen)) > 0
    assert list(temporary.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("layout", ["mcap-file"])
def test_a_file_is_unpacked_once_and_its_copy_goes_with_the_last_reader(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    path = write(tmp_path / "packed", SIM, events(SIM, 1.0), layout)
    unpacked: list[Path] = []
    decompress = bags._decompress

    def counted(source: Path, target: Path) -> None:
        unpacked.append(source)
        decompress(source, target)

    monkeypatch.setattr(bags, "_decompress", counted)
    (episode,) = extract(path, SIM, RULES)
    assert isinstance(episode, Episode)
    assert len(list(temporary.iterdir())) == 1
    for frames in episode.frames.values():
        assert len(list(frames)) == len(episode)
    assert len(unpacked) == 1
    del episode, frames
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_full_temporary_disk_is_named_and_nothing_is_rejected_for_it(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch, small_spec: str
) -> None:
    spec = load_spec(small_spec)
    (tmp_path / "bags").mkdir()
    write(tmp_path / "bags" / "a.bag", spec, events(spec, 1.0, is_ros1=True), "bag-bz2")
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    settings = ConversionSettings(small_spec, extract=RULES)
    with pytest.raises(UserError, match=r"no space is left in .*temporary.* a\.bag \(set TMPDIR"):
        convert(find_recordings([tmp_path / "bags"]), tmp_path / "out", settings, extract)
    assert not list((tmp_path / "out").glob("meta*"))


def test_other_faults_stay_what_they_are(tmp_path: Path) -> None:
    def fail(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    with pytest.raises(PermissionError, match="Permission denied"):
        Unpacked().file(tmp_path / "a.mcap.zstd", fail)


def test_kept_chunks_are_told_apart_by_file_and_place() -> None:
    unpacked = Unpacked()
    for name, start, data in (("a", 0, b"one"), ("a", 9, b"two"), ("b", 0, b"three"), ("a", 0, b"again")):
        unpacked.keep(Path(name), start, data)
    assert unpacked.chunk(Path("a"), 0) == b"one"
    assert unpacked.chunk(Path("a"), 9) == b"two"
    assert unpacked.chunk(Path("b"), 0) == b"three"
    assert unpacked.chunk(Path("b"), 9) is None
