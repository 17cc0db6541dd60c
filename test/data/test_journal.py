"""What is written down survives every crash, and a crash while writing down is as if it had not begun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.data.journal import Journal, exclusive, to_line, write_durably
from kuavo_smolvla_ros.errors import UserError

RECORDS = [
    {"n": 1, "text": "夹取 é"},
    {"n": 2, "list": [1, 2.5, None]},
    {"n": 3, "nested": {"a": "line\nbreak"}},
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(path: Path) -> Journal:
    journal = Journal(path)
    for record in RECORDS:
        journal.append(record)
    return journal


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    assert written(tmp_path / "j").records == RECORDS
    assert Journal(tmp_path / "j").records == RECORDS


@given(record=st.dictionaries(st.text(), json_values))
def test_any_record_is_one_line_and_comes_back(
    record: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    Journal(path).append(record)
    assert path.read_bytes().count(b"\n") == 1
    assert Journal(path).records == [record]


def test_a_journal_cut_at_any_byte_is_a_journal_of_fewer_records(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        journal = Journal(path)
        assert journal.records == RECORDS[: content[:length].count(b"\n")]
        journal.append({"n": 9})
        assert Journal(path).records == [*RECORDS[: content[:length].count(b"\n")], {"n": 9}]


def test_damage_within_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path)
    path.write_bytes(path.read_bytes().replace(b'{"list"', b'{list"'))
    with pytest.raises(UserError, match=r"j, line 2, is damaged.*remove the folder"):
        Journal(path)


def test_keep_forgets_the_rest(tmp_path: Path) -> None:
    journal = written(tmp_path / "j")
    journal.keep(1)
    assert journal.records == RECORDS[:1]
    assert Journal(tmp_path / "j").records == RECORDS[:1]


def test_equal_records_are_equal_bytes() -> None:
    assert to_line({"a": 1, "b": 2}) == to_line({"b": 2, "a": 1})


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_replacing_a_file_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_durably(tmp_path / "file", b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    write_durably(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from kuavo_smolvla_ros.data.journal import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_at_a_time_and_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another conversion is writing"), exclusive(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # and a lock that was given back can be taken again
        pass
