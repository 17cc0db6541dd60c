"""Recordings are found by name and known by content."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuavo_smolvla_ros.data.recordings import content_hash, find_recordings
from kuavo_smolvla_ros.errors import UserError


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_files_and_rosbag2_folders_are_found_at_any_depth_in_order(tmp_path: Path) -> None:
    put(tmp_path / "b.bag", b"12345")
    put(tmp_path / "task1" / "a.mcap")
    put(tmp_path / "task1" / "split" / "metadata.yaml")
    put(tmp_path / "task1" / "split" / "split_0.mcap", b"123")
    put(tmp_path / "task1" / "split" / "split_1.mcap", b"123")
    put(tmp_path / "z.db3")
    put(tmp_path / "notes.txt")
    put(tmp_path / ".hidden" / "c.bag")
    found = find_recordings([tmp_path])
    assert [r.name for r in found] == ["b.bag", "task1/a.mcap", "task1/split", "z.db3"]
    assert [r.bytes for r in found] == [5, 1, 7, 1]


def test_one_file_or_folder_is_itself(tmp_path: Path) -> None:
    put(tmp_path / "a.bag")
    put(tmp_path / "rosbag" / "metadata.yaml")
    assert [r.name for r in find_recordings([tmp_path / "a.bag"])] == ["a.bag"]
    assert [r.name for r in find_recordings([tmp_path / "rosbag"])] == ["rosbag"]


def test_the_same_place_twice_is_once(tmp_path: Path) -> None:
    put(tmp_path / "a.bag")
    assert len(find_recordings([tmp_path, tmp_path])) == 1


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "monday" / "a.bag")
    put(tmp_path / "tuesday" / "a.bag")
    with pytest.raises(UserError, match=r"two recordings are called 'a.bag'.*give the folder above"):
        find_recordings([tmp_path / "monday", tmp_path / "tuesday"])
    assert [r.name for r in find_recordings([tmp_path])] == ["monday/a.bag", "tuesday/a.bag"]


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recording"):
        find_recordings([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no recording"):
        find_recordings([tmp_path / "empty"])
    with pytest.raises(UserError, match="holds no recording"):
        find_recordings([put(tmp_path / "movie.mp4")])


def test_the_content_decides_the_hash_and_the_place_does_not(tmp_path: Path) -> None:
    a = put(tmp_path / "a.bag", b"same")
    b = put(tmp_path / "elsewhere" / "b.bag", b"same")
    c = put(tmp_path / "c.bag", b"Same")
    assert content_hash(a) == content_hash(b) != content_hash(c)


def test_bytes_moved_from_one_file_of_a_folder_to_the_next_change_the_hash(tmp_path: Path) -> None:
    for name, parts in {"one": (b"ab", b"c"), "two": (b"a", b"bc")}.items():
        for number, part in enumerate(parts):
            put(tmp_path / name / f"{number}.mcap", part)
    assert content_hash(tmp_path / "one") != content_hash(tmp_path / "two")
