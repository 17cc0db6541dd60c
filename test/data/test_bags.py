"""Recordings of every format: read as rosbags reads them where whole, and up to the damage where not."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType, Writer
from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Writer1
from rosbags.typesys import Stores, get_typestore

from kuavo_smolvla_ros.data.bags import BagError, open_bag
from kuavo_smolvla_ros.data.synthetic_bags import FORMATS, blank, events, light, type_store, write
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.spec import load_spec

Messages = list[tuple[str, int, bytes]]
SIM, SIM_BAG = light(load_spec("kuavo_sim")), light(load_spec("kuavo_sim_bag"))


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One recording of every format; tests copy what they change."""
    folder = tmp_path_factory.mktemp("formats")
    of_ros1, of_ros2 = events(SIM_BAG, 2.0, is_ros1=True), events(SIM, 2.0)
    paths = {}
    for layout in FORMATS:
        is_ros1 = layout.startswith("bag")
        path = folder / (f"{layout}.bag" if is_ros1 else layout)
        paths[layout] = write(
            path,
            SIM_BAG if is_ros1 else SIM,
            of_ros1 if is_ros1 else of_ros2,
            layout,
            custom_data={"a.b": "c"},
        )
    return paths


def read(path: Path) -> Messages:
    with open_bag(path) as bag:
        return [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]


def file_of(folder: Path) -> Path:
    (file,) = (p for p in folder.iterdir() if p.name != "metadata.yaml")
    return file


@pytest.mark.parametrize("layout", FORMATS)
def test_whole_recordings_read_as_rosbags_reads_them(recorded: dict[str, Path], layout: str) -> None:
    path = recorded[layout]
    with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
        expected = [(c.topic, t, bytes(raw)) for c, t, raw in reader.messages()]
        types = {c.topic: c.msgtype for c in reader.connections}
        decoded = reader.deserialize(expected[0][2], types[expected[0][0]])
    with open_bag(path) as bag:
        assert bag.types == types
        found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
        assert bag.damages == []
        first = next(bag.messages()).decode()
    assert Counter(found) == Counter(expected)
    for topic in types:  # order across topics is the recorder's, within a topic it is that of receipt
        assert [m for m in found if m[0] == topic] == [m for m in expected if m[0] == topic]
    assert type(first).__name__.split("__")[-1] == type(decoded).__name__.split("__")[-1]
    assert first.header.stamp.sec == decoded.header.stamp.sec


@pytest.mark.parametrize("layout", FORMATS)
def test_a_place_leads_back_to_the_message(recorded: dict[str, Path], layout: str) -> None:
    with open_bag(recorded[layout]) as bag:
        listed = [(m.place, bytes(m.data)) for m in bag.messages()]
    np.random.default_rng(0).shuffle(listed)
    with open_bag(recorded[layout], survey=False) as bag:  # another opening, nothing known of the recording
        for place, data in listed:
            assert bag.read(place) == data


@pytest.mark.parametrize("layout", FORMATS)
def test_only_the_topics_asked_for_are_given(recorded: dict[str, Path], layout: str) -> None:
    with open_bag(recorded[layout]) as bag:
        assert {m.topic for m in bag.messages({"/gripper/state", "/nothing"})} == {"/gripper/state"}
        assert list(bag.messages({"/nothing"})) == []
        assert list(bag.messages(set())) == []


def test_robots_own_messages_decode_by_the_definition_in_the_bag(recorded: dict[str, Path]) -> None:
    with open_bag(recorded["bag"]) as bag:
        assert bag.types["/sensors_data_raw"] == "kuavo_msgs/msg/sensorsData"
        message = next(bag.messages({"/sensors_data_raw"})).decode()
    assert message.joint_data.joint_q.shape == (28,)


@pytest.mark.parametrize("layout", ["mcap", "mcap-zstd", "mcap-file", "sqlite3"])
def test_what_the_recorder_noted_is_there(recorded: dict[str, Path], layout: str) -> None:
    with open_bag(recorded[layout]) as bag:
        assert bag.metadata["a.b"] == "c"


# Damaged files.


@pytest.mark.parametrize("layout", ["bag", "bag-lz4", "mcap", "mcap-zstd", "sqlite3"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(share=st.floats(0.0, 0.999))
def test_a_file_cut_off_anywhere_gives_what_stands_before(
    recorded: dict[str, Path], tmp_path: Path, layout: str, share: float
) -> None:
    source = recorded[layout]
    whole = read(source)
    source = source if source.is_file() else file_of(source)
    cut = tmp_path / f"cut{source.suffix}"
    cut.write_bytes(source.read_bytes()[: int(share * source.stat().st_size)])
    # sqlite3 keeps its tables' names in the first pages, the others need their first mark only.
    needed = 0.2 if layout == "sqlite3" else 0.001
    with contextlib.suppress(BagError) if share < needed else contextlib.nullcontext():
        with open_bag(cut) as bag:
            found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
            damages = bag.damages
        assert found == whole[: len(found)]
        if len(found) < len(whole):
            assert damages[0].file == cut.name


@pytest.mark.parametrize("layout", ["bag", "bag-lz4", "mcap", "mcap-zstd", "sqlite3"])
def test_a_file_cut_off_near_its_end_loses_no_more_than_a_chunk(tmp_path: Path, layout: str) -> None:
    is_ros1 = layout.startswith("bag")
    spec = light(load_spec("kuavo_sim_bag" if is_ros1 else "kuavo_sim"), 192, 256)
    path = write(tmp_path / "whole.bag", spec, events(spec, 3.0, is_ros1=is_ros1), layout)
    whole = read(path)
    source = path if is_ros1 else file_of(path)
    cut = tmp_path / f"cut{source.suffix}"
    cut.write_bytes(source.read_bytes()[: int(0.97 * source.stat().st_size)])
    found = read(cut)
    lost = sum(len(m[2]) for m in whole) - sum(len(m[2]) for m in found)
    assert found == whole[: len(found)]
    assert (
        lost < 0.03 * source.stat().st_size + (1 << 20) + 50_000
    )  # rosbags begins a chunk every 2**20 bytes
    assert len(found) > 0.5 * len(whole)


def test_bag_of_a_killed_recorder_is_read_without_its_index(
    recorded: dict[str, Path], tmp_path: Path
) -> None:
    """ROS 1 leaves an index position of zero, and a last chunk whose header says it is empty."""
    data = bytearray(recorded["bag"].read_bytes())
    at = data.index(b"index_pos=") + len(b"index_pos=")
    index = struct.unpack_from("<Q", data, at)[0]
    struct.pack_into("<Q", data, at, 0)
    whole = read(recorded["bag"])
    killed = tmp_path / "killed.bag"
    killed.write_bytes(data[:index])
    with open_bag(killed) as bag:
        assert bag.types == _types(recorded["bag"])
        assert [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()] == whole
        assert "no index" in bag.damages[0].sentence

    position = len(b"#ROSBAG V2.0\n")
    while position < index:
        header_end = position + 4 + struct.unpack_from("<I", data, position)[0]
        if b"op=\x05" in data[position:header_end]:
            length_at = header_end
        position = header_end + 4 + struct.unpack_from("<I", data, header_end)[0]
    chunk = bytes(data[length_at + 4 : length_at + 4 + struct.unpack_from("<I", data, length_at)[0]])
    struct.pack_into("<I", data, length_at, 0)
    killed.write_bytes(data[: length_at + 4] + chunk[:-10])
    found = read(killed)
    assert found == whole[: len(found)]
    assert len(found) == len(whole) - 1  # the message that was being written


def _types(path: Path) -> dict[str, str]:
    with open_bag(path) as bag:
        return bag.types


def test_a_damaged_chunk_is_left_out_and_the_rest_read(recorded: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "checked.mcap"
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=2000, compression=CompressionType.ZSTD)
        writer.start()
        schema = writer.register_schema("std_msgs/msg/String", "ros2msg", b"string data")
        channel = writer.register_channel("/text", "cdr", schema)
        for number in range(200):
            text = f"text number {number:4d} " + os.urandom(20).hex()
            data = b"\0\1\0\0" + struct.pack("<I", len(text) + 1) + text.encode() + b"\0"
            writer.add_message(channel, log_time=number, data=data, publish_time=number)
        writer.finish()
    whole = read(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with open_bag(path) as bag:
        found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
        (damage,) = bag.damages
    assert "damaged" in damage.sentence
    missing = [m[1] for m in whole if m not in found]
    assert 0 < len(missing) < 60
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert damage.receive_ns == missing[0] - 1


def test_a_damaged_compressed_chunk_of_ros1_is_left_out(recorded: dict[str, Path], tmp_path: Path) -> None:
    source = recorded["bag-bz2"]
    whole = read(source)
    data = bytearray(source.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path = tmp_path / "damaged.bag"
    path.write_bytes(data)
    with open_bag(path) as bag:
        found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
        assert any("damaged" in d.sentence or "cut off" in d.sentence for d in bag.damages)
    assert len(found) < len(whole)
    assert set(found) <= set(whole)


@pytest.mark.parametrize("name", ["a.bag", "a.mcap", "a.db3"])
def test_empty_and_foreign_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    with pytest.raises(BagError, match=f"{name}: is empty"), open_bag(path):
        pass
    path.write_bytes(b"something else altogether, and longer than any header" * 20)
    with pytest.raises(BagError, match=rf"{name}: (is no|cannot be read)"), open_bag(path):
        pass


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="there is no such recording"), open_bag(tmp_path / "none.bag"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(BagError, match="holds no recording"), open_bag(tmp_path / "folder"):
        pass
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BagError, match="is no recording"), open_bag(tmp_path / "notes.txt"):
        pass
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V1.2\n" + bytes(100))
    with pytest.raises(BagError, match=r"V1\.2.*not supported"), open_bag(tmp_path / "old.bag"):
        pass


def test_no_permission_is_said(recorded: dict[str, Path], locked: Callable[[Path], Any]) -> None:
    with (
        locked(recorded["bag"]) as path,
        pytest.raises(BagError, match=f"{path}: no permission to read it"),
        open_bag(path),
    ):
        pass


# Folders of several files.


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A recording divided into three files, of which the third is number 10."""
    happened = sorted(events(SIM, 3.0), key=lambda e: e.receive_ns)
    folder = tmp_path / "split"
    folder.mkdir()
    names = []
    third = len(happened) // 3
    for number, part in (
        (0, happened[:third]),
        (2, happened[third : 2 * third]),
        (10, happened[2 * third :]),
    ):
        piece = write(tmp_path / f"piece{number}", SIM, part)
        names.append(f"split_{number}.mcap")
        file_of(piece).rename(folder / names[-1])
    metadata = yaml.safe_load((piece / "metadata.yaml").read_text())
    metadata["rosbag2_bagfile_information"]["relative_file_paths"] = names
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))
    return folder


def test_files_of_a_split_recording_follow_one_another(split: Path) -> None:
    times = [m[1] for m in read(split)]
    assert times == sorted(times)
    assert times[-1] - times[0] > 2.9e9
    with open_bag(split) as bag:
        assert bag.damages == []
        for message in bag.messages({"/gripper/state"}):
            data = bytes(message.data)
            assert bag.read(message.place) == data


def test_without_metadata_files_are_read_in_their_numbers_order(split: Path) -> None:
    whole = read(split)
    (split / "metadata.yaml").unlink()
    assert read(split) == whole
    with open_bag(split) as bag:
        assert [d.file for d in bag.damages] == ["metadata.yaml"]
    (split / "metadata.yaml").write_text("{ this is: [no yaml")
    assert read(split) == whole


def test_missing_and_unlisted_files_are_named(split: Path) -> None:
    whole = read(split)
    (split / "split_2.mcap").rename(split / "split_11.mcap")
    with open_bag(split) as bag:
        found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
        sentences = {d.file: d.sentence for d in bag.damages}
    assert Counter(found) == Counter(whole)
    assert "not there" in sentences["split_2.mcap"]
    assert "does not list" in sentences["split_11.mcap"]


def test_one_unreadable_file_of_several_does_not_hide_the_others(split: Path) -> None:
    whole = read(split)
    (split / "split_2.mcap").write_bytes(b"")
    with open_bag(split) as bag:
        found = [(m.topic, m.receive_ns, bytes(m.data)) for m in bag.messages()]
        assert {d.file: d.sentence for d in bag.damages} == {"split_2.mcap": "is empty"}
    assert 0.6 * len(whole) < len(found) < 0.7 * len(whole)


def test_places_count_files_that_only_a_survey_finds_unreadable(tmp_path: Path) -> None:
    """A database of something else opens well until its tables are asked for."""
    happened = sorted(events(SIM, 1.0), key=lambda e: e.receive_ns)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, part in ((0, happened[:200]), (2, happened[200:])):
        piece = write(tmp_path / f"piece{number}", SIM, part, "sqlite3")
        file_of(piece).rename(folder / f"mixed_{number}.db3")
    with sqlite3.connect(folder / "mixed_1.db3") as other:
        other.execute("CREATE TABLE something (number)")
    with open_bag(folder) as bag:
        listed = [(m.place, bytes(m.data)) for m in bag.messages()]
        assert any(d.file == "mixed_1.db3" and "no tables" in d.sentence for d in bag.damages)
    assert {place.file for place, _ in listed} == {0, 2}
    with open_bag(folder, survey=False) as bag:
        assert all(bag.read(place) == data for place, data in listed)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.LZ4, CompressionType.ZSTD])
def test_every_kind_of_mcap_is_read(tmp_path: Path, compression: CompressionType, chunked: bool) -> None:
    path = tmp_path / "kinds.mcap"
    expected = []
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=500, compression=compression, use_chunking=chunked)
        writer.start()
        writer.add_metadata("kuavo_smolvla_ros", {"task": "task2_weighing"})
        schema = writer.register_schema("std_msgs/msg/String", "ros2msg", b"string data")
        for topic in ("/a", "/b"):
            channel = writer.register_channel(topic, "cdr", schema)
            for number in range(60):
                data = b"\0\1\0\0" + struct.pack("<I", 3) + b"%02d" % number + b"\0"
                writer.add_message(channel, log_time=number, data=data, publish_time=number)
                expected.append((topic, number, data))
        writer.finish()
    assert read(path) == expected
    with open_bag(path) as bag:
        assert bag.metadata == {"kuavo_smolvla_ros.task": "task2_weighing"}
        listed = [(m.place, bytes(m.data)) for m in bag.messages()]
        assert all(bag.read(place) == data for place, data in listed)
        assert bag.damages == []
    path.write_bytes(path.read_bytes()[:-400])  # no summary: the metadata stand before the messages
    with open_bag(path) as bag:
        assert bag.metadata == {"kuavo_smolvla_ros.task": "task2_weighing"}


def test_what_a_killed_recorder_left_in_the_write_ahead_log_is_read(
    recorded: dict[str, Path], tmp_path: Path
) -> None:
    whole = read(recorded["sqlite3"])
    path = tmp_path / "live.db3"
    shutil.copy(file_of(recorded["sqlite3"]), path)
    recorder = sqlite3.connect(path)
    recorder.execute("PRAGMA journal_mode=WAL")
    recorder.execute("PRAGMA wal_autocheckpoint=0")
    recorder.execute(
        "INSERT INTO messages (topic_id, timestamp, data) SELECT topic_id, 1, data FROM messages LIMIT 1"
    )
    recorder.commit()
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in (path, path.with_name("live.db3-wal")):  # as they lie on the disk when the process is gone
        shutil.copy(file, killed / file.name)
    recorder.close()
    assert len(read(killed / "live.db3")) == len(whole) + 1


# Definitions.


def test_types_without_a_definition_fall_back_to_the_robots_own_or_are_named(tmp_path: Path) -> None:
    def mcap_without_definitions(type_name: str, data: bytes) -> Path:
        path = tmp_path / f"{type_name.rpartition('/')[2]}.mcap"
        with path.open("wb") as file:
            writer = Writer(file)
            writer.start()
            schema = writer.register_schema(type_name, "", b"")
            channel = writer.register_channel("/x", "cdr", schema)
            writer.add_message(channel, log_time=1, data=data, publish_time=1)
            writer.finish()
        return path

    store, claw = type_store(is_ros1=False), "kuavo_msgs/msg/lejuClawState"
    message = blank(store, claw)
    message.data.position = np.array([20.0, 80.0])
    data = bytes(store.serialize_cdr(message, claw))
    with open_bag(mcap_without_definitions(claw, data)) as bag:
        assert next(bag.messages()).decode().data.position.tolist() == [20.0, 80.0]
    with open_bag(mcap_without_definitions("some_msgs/msg/Other", b"\0\1\0\0")) as bag:
        message = next(bag.messages())
        with pytest.raises(MessageError, match=r"does not define some_msgs/msg/Other \(/x\)"):
            message.decode()


@pytest.mark.parametrize("sign", ["=", " = ", "= "])
def test_constants_in_the_robots_definitions_are_no_fields(tmp_path: Path, sign: str) -> None:
    """The claw's own definition has constants in lower case, which rosbags by itself cannot read."""
    store, claw = type_store(is_ros1=True), "kuavo_msgs/msg/lejuClawState"
    plain, digest = store.generate_msgdef(claw)
    names = ("kError", "kUnknown", "kMoving", "kReached", "kGrabbed")
    constants = "".join(f"int8 {name}{sign}{value}\n" for value, name in enumerate(names, -1))
    message = blank(store, claw)
    message.state, message.data.position = np.array([1, 2], np.int8), np.array([20.0, 80.0])
    path = tmp_path / "claw.bag"
    with Writer1(path) as writer:
        connection = writer.add_connection("/claw", claw, msgdef=constants + plain, md5sum=digest)
        writer.write(connection, 5, store.serialize_ros1(message, claw))
    with open_bag(path) as bag:
        decoded = next(bag.messages()).decode()
    assert decoded.data.position.tolist() == [20.0, 80.0]
    assert decoded.state.tolist() == [1, 2]


def test_ros1_messages_inside_mcap_are_read(tmp_path: Path) -> None:
    path = tmp_path / "converted.mcap"
    with path.open("wb") as file:
        writer = Writer(file)
        writer.start(profile="ros1")
        schema = writer.register_schema("std_msgs/String", "ros1msg", b"string data")
        channel = writer.register_channel("/text", "ros1", schema)
        writer.add_message(channel, log_time=7, data=struct.pack("<I", 5) + b"hello", publish_time=7)
        writer.finish()
    with open_bag(path) as bag:
        assert bag.types == {"/text": "std_msgs/msg/String"}
        (message,) = bag.messages()
        assert message.decode().data == "hello"


def test_damaged_bytes_of_a_message_are_an_error_that_says_so(recorded: dict[str, Path]) -> None:
    for layout in ("bag", "mcap"):
        with open_bag(recorded[layout]) as bag:
            message = next(bag.messages({"/gripper/state"}))
            short = type(message)(**{**message.__dict__, "data": message.data[:20]})
            with pytest.raises(MessageError, match="no whole sensor_msgs/msg/JointState"):
                short.decode()
