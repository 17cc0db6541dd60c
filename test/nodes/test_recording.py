"""Episodes on the disk without ROS: definitions, files that others read, cuts at any byte, full disks."""

from __future__ import annotations

import importlib
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import CompressedImage, JointState

from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata, read_recording_metadata
from kuavo_smolvla_ros.nodes.message_definition import definition
from kuavo_smolvla_ros.nodes.recording import (
    Episode,
    Received,
    RecordingError,
    SimClock,
    StreamWatch,
    Topic,
    free_gb,
    instruction_of,
    next_folder,
)
from kuavo_smolvla_ros.robot.spec import load_spec

S = 1_000_000_000
START_NS = 1_760_000_000 * S
SPEC = load_spec("kuavo_sim")
METADATA = RecordingMetadata.of(SPEC, "task2_weighing", "Weigh the parcel")
TYPES = ("sensor_msgs/msg/JointState", "sensor_msgs/msg/CompressedImage")
TOPICS = [Topic(name, kind, definition(kind)) for name, kind in zip(("/arms", "/camera"), TYPES, strict=True)]
PACKAGES = (
    *("std_msgs", "sensor_msgs", "geometry_msgs", "trajectory_msgs", "diagnostic_msgs", "nav_msgs"),
    *("builtin_interfaces", "rcl_interfaces", "lifecycle_msgs", "rosgraph_msgs"),
)


def standard_types() -> list[str]:
    known = get_typestore(Stores.ROS2_JAZZY).fielddefs
    found = [f"{p}/msg/{n}" for p in PACKAGES for n in dir(importlib.import_module(f"{p}.msg"))]
    return [name for name in found if name in known]


class TestDefinition:
    @pytest.mark.parametrize("name", standard_types())
    def test_it_is_the_standard_one(self, name: str) -> None:
        """By ROS's own hash of a type's structure."""
        store = get_typestore(Stores.EMPTY)
        store.register(get_types_from_msg(definition(name), name))
        standard = get_typestore(Stores.ROS2_JAZZY)
        if name == "std_msgs/msg/Char":  # the class no longer knows that it was not a uint8; the bytes agree
            name = "std_msgs/msg/UInt8"
            store.register(get_types_from_msg(definition("std_msgs/msg/Char"), name))
        assert store.hash_rihs01(name) == standard.hash_rihs01(name)

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            ("double", "float64"),
            ("octet", "byte"),
            ("boolean[3]", "bool[3]"),
            ("sequence<float>", "float32[]"),
            ("sequence<float, 5>", "float32[<=5]"),
            ("string<10>", "string<=10"),
            ("sequence<string<10>, 4>", "string<=10[<=4]"),
            ("wstring[2]", "wstring[2]"),
        ],
    )
    def test_every_kind_of_field(self, kind: str, text: str) -> None:
        assert definition("a/msg/B", lambda _: {"x": kind}) == f"{text} x\n"

    def test_what_a_type_is_made_of_follows_once(self) -> None:
        types = {
            "a/msg/A": {"b": "a/B", "c": "sequence<a/B, 2>", "d": "c/D[3]"},
            "a/msg/B": {"d": "c/D"},
            "c/msg/D": {"x": "int8"},
        }
        text = definition("a/msg/A", types.__getitem__)
        line = "=" * 80
        assert text == f"a/B b\na/B[<=2] c\nc/D[3] d\n{line}\nMSG: a/B\nc/D d\n{line}\nMSG: c/D\nint8 x\n"


def joint_state(number: int) -> bytes:
    message = JointState()
    message.header.frame_id = str(number)
    # All three, for rclpy leaves bytes behind empty ones that plain rosbags refuses (see robot/cdr.py).
    message.position = message.velocity = message.effort = [float(number)]
    return bytes(serialize_message(message))


def picture(size: int) -> bytes:
    message = CompressedImage()
    message.format = "jpeg"
    message.data = bytes(size)
    return bytes(serialize_message(message))


def batch(first: int, count: int, picture_bytes: int = 100) -> list[Received]:
    """One message of each topic every 10 ms."""
    found = []
    for number in range(first, first + count):
        time_ns = START_NS + number * S // 100
        found.append(Received(0, time_ns, time_ns - 1000, number, joint_state(number)))
        found.append(Received(1, time_ns + 1, time_ns, number, picture(picture_bytes)))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "bags" / "episode_0000_task"
    assert not [t for t in threading.enumerate() if t.name == "episode"]


def numbers(path: Path) -> list[int]:
    with open_bag(path) as bag:
        return [int(m.decode().header.frame_id) for m in bag.messages({"/arms"})]


def test_others_read_it(folder: Path) -> None:
    episode = Episode(folder, TOPICS, METADATA)
    for first in range(0, 300, 10):
        episode.add(batch(first, 10))
    written = episode.finish()
    assert (written.messages, written.counts) == (600, [300, 300])
    assert written.seconds == pytest.approx(2.99)
    with AnyReader([folder]) as reader:
        assert {c.topic: (c.msgtype, c.msgcount) for c in reader.connections} == {
            "/arms": (TYPES[0], 300),
            "/camera": (TYPES[1], 300),
        }
        assert reader.duration == written.last_ns - START_NS + 1
        times = []
        for connection, time_ns, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            times.append(time_ns)
            if connection.topic == "/arms":
                assert message.position[0] == int(message.header.frame_id) == (time_ns - START_NS) * 100 // S
    assert times == sorted(times)
    assert times[0] == START_NS


def test_our_reader_finds_task_instruction_and_robot(folder: Path) -> None:
    episode = Episode(folder, TOPICS, METADATA)
    episode.add(batch(0, 5))
    episode.finish()
    (file,) = folder.glob("*.mcap")
    for path in (folder, file):
        with open_bag(path) as bag:
            assert read_recording_metadata(bag.metadata) == METADATA
            assert bag.types == dict(zip(("/arms", "/camera"), TYPES, strict=True))
            assert not bag.damages
    assert numbers(folder) == list(range(5))
    custom = yaml.safe_load((folder / "metadata.yaml").read_text())["rosbag2_bagfile_information"][
        "custom_data"
    ]
    assert custom["kuavo_smolvla_ros.instruction"] == "Weigh the parcel"


def test_the_lone_file_keeps_the_publishers_count_and_times(folder: Path) -> None:
    from mcap.reader import make_reader

    episode = Episode(folder, TOPICS, METADATA)
    episode.add(batch(7, 3))
    episode.finish()
    with next(folder.glob("*.mcap")).open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        messages = [message for _, _, message in reader.iter_messages(topics="/arms")]
        assert reader.get_header().profile == "ros2"
    assert [(m.sequence, m.log_time - m.publish_time) for m in messages] == [(n, 1000) for n in (7, 8, 9)]


def test_an_empty_episode_is_a_whole_recording(folder: Path) -> None:
    assert Episode(folder, TOPICS, METADATA).finish().messages == 0
    with open_bag(folder) as bag:
        assert read_recording_metadata(bag.metadata) == METADATA
        assert list(bag.messages()) == []
        assert not bag.damages


def test_discarding_leaves_nothing(folder: Path) -> None:
    episode = Episode(folder, TOPICS, METADATA)
    episode.add(batch(0, 100))
    episode.discard()
    assert not folder.exists()


def test_an_episode_never_goes_into_another(folder: Path) -> None:
    first = Episode(folder, TOPICS, METADATA)
    with pytest.raises(RecordingError, match="cannot be recorded to: File exists"):
        Episode(folder, TOPICS, METADATA)
    first.finish()


def test_what_was_flushed_is_read_wherever_the_file_ends(folder: Path, tmp_path: Path) -> None:
    episode = Episode(folder, TOPICS, METADATA)
    for first in range(0, 600, 20):
        episode.add(batch(first, 20, picture_bytes=20_000))
    episode.finish()
    whole = next(folder.glob("*.mcap")).read_bytes()
    everything = numbers(folder)
    cut = tmp_path / "cut.mcap"
    start = whole.index(b"task2_weighing") + 3000  # behind the metadata and the first chunk's head

    @given(st.integers(start, len(whole) - 1))
    @settings(max_examples=40)
    def ends_at(length: int) -> None:
        cut.write_bytes(whole[:length])
        found = numbers(cut)
        assert found == everything[: len(found)]
        # A chunk holds 1 MiB, here about 52 of each; whoever cuts loses one at most.
        assert len(found) >= (length / len(whole)) * len(everything) - 60
        with open_bag(cut) as bag:
            list(bag.messages())
            assert read_recording_metadata(bag.metadata) == METADATA
            # Where only the index at the end is missing, no message is.
            assert bag.damages or found == everything

    ends_at()


def test_a_disk_that_is_full_ends_the_episode_and_keeps_what_is_there(folder: Path) -> None:
    """A limit on file sizes stands for the disk: writing fails in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    episode = Episode(folder, TOPICS, METADATA)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, hard))
    try:
        for first in range(0, 600, 20):
            episode.add(batch(first, 20, picture_bytes=20_000))
        with pytest.raises(RecordingError, match=r"the episode was cut off: File too large \(\d+ messages"):
            episode.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = numbers(folder)
    assert len(found) > 100
    assert found == list(range(len(found)))
    assert not (folder / "metadata.yaml").exists()


def test_a_disk_that_does_not_keep_up_ends_the_episode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kuavo_smolvla_ros.nodes.recording.BACKLOG_BYTES", 1000)
    episode = Episode(folder, TOPICS, METADATA)
    episode.add(batch(0, 5))
    episode.add(batch(5, 100, picture_bytes=20_000))
    assert episode.error is not None
    assert "does not keep up" in episode.error
    with pytest.raises(RecordingError, match="does not keep up"):
        episode.finish()


def test_no_permission_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="cannot be recorded to: Not a directory"):
        Episode(tmp_path / "file" / "episode_0000_x", TOPICS, METADATA)


class TestStreamWatch:
    def test_rate_gap_and_loss(self) -> None:
        watch = StreamWatch()
        watch.rate(START_NS)
        for number in range(100):
            if number not in (40, 41, 70):
                watch.hear(START_NS + number * S // 100, number + 1, number / 100)
        watch.rate(START_NS + S)
        assert watch.rate_hz == pytest.approx(97)
        assert watch.lost == 3
        assert watch.longest_gap_s == pytest.approx(0.03)

    def test_a_publisher_that_starts_again_has_lost_nothing(self) -> None:
        watch = StreamWatch()
        for sequence in (5, 6, 1, 2, 3):
            watch.hear(START_NS, sequence, 0.0)
        assert watch.lost == 0

    def test_a_gap_that_lasts_is_a_gap(self) -> None:
        watch = StreamWatch()
        watch.hear(START_NS, 1, 0.0)
        watch.rate(START_NS + 7 * S)
        assert watch.longest_gap_s == pytest.approx(7.0)
        assert watch.is_silent(7.0, 1.0)
        assert not watch.is_silent(0.5, 1.0)

    def test_an_episode_counts_from_its_beginning(self) -> None:
        watch = StreamWatch()
        assert watch.is_silent(0.0, 1.0)
        watch.hear(START_NS, 1, 0.0)
        watch.hear(START_NS + 9 * S, 9, 9.0)
        watch.begin(START_NS + 10 * S)
        assert (watch.count, watch.lost, watch.longest_gap_s) == (0, 0, 0.0)
        watch.hear(START_NS + 10 * S + S // 2, 11, 10.5)
        watch.rate(START_NS + 11 * S)
        assert (watch.count, watch.lost) == (1, 1)
        assert watch.longest_gap_s == pytest.approx(0.5)
        assert watch.rate_hz == pytest.approx(1.0)

    def test_a_clock_that_stands_still_has_no_rate(self) -> None:
        watch = StreamWatch()
        watch.rate(START_NS)
        watch.hear(START_NS, 1, 0.0)
        watch.rate(START_NS)
        assert watch.rate_hz == 0.0


class TestSimClock:
    def test_a_message_has_the_time_the_clock_said_last_before_it(self) -> None:
        clock = SimClock()
        assert clock.at(START_NS) is None
        for k in range(10):
            clock.note(START_NS + k * S, k)
        assert [clock.at(START_NS + n * S // 10) for n in (0, 9, 10, 55, 1000)] == [0, 0, 1, 5, 9]
        assert clock.at(0) == 0, "before the first that is known"

    def test_a_clock_that_jumps_back_is_followed(self) -> None:
        clock = SimClock()
        for k, said in enumerate((50, 51, 0, 1)):
            clock.note(START_NS + k, said)
        assert [clock.at(START_NS + k) for k in range(4)] == [50, 51, 0, 1]

    def test_it_does_not_grow(self) -> None:
        clock = SimClock()
        for k in range(3 * SimClock.KEPT):
            clock.note(k, k)
        assert clock.at(0) == 2 * SimClock.KEPT
        assert clock.at(3 * SimClock.KEPT) == 3 * SimClock.KEPT - 1


class TestFolders:
    def test_numbers_rise(self, tmp_path: Path) -> None:
        root = tmp_path / "not" / "there"
        assert next_folder(root, "a").name == "episode_0000_a"
        for name in ("episode_0003_b", "episode_0010_c", "episode_x", "other_0099"):
            (root / name).mkdir(parents=True)
        assert next_folder(root, "a").name == "episode_0011_a"

    @given(st.text(max_size=40))
    def test_any_task_makes_a_name(self, task: str) -> None:
        name = next_folder(Path("/nowhere"), task).name
        assert name.startswith("episode_0000_")
        assert "/" not in name
        assert name.isascii()

    def test_free_space_of_a_folder_that_is_not_there_yet(self, tmp_path: Path) -> None:
        assert free_gb(tmp_path / "a" / "b") == pytest.approx(free_gb(tmp_path), rel=0.1)

    @pytest.mark.parametrize("task", ["free", "", "../task1_moving_grasp", "task1_moving_grasp.yaml", "a b"])
    def test_other_tasks_have_no_sentence(self, task: str) -> None:
        assert instruction_of(task) is None

    def test_the_curriculums_tasks_have_one(self) -> None:
        found: dict[str, Any] = {t: instruction_of(t) for t in ("task1_moving_grasp", "task2_weighing")}
        assert found["task1_moving_grasp"].startswith("Pick up the moving object")
        assert "electronic scale" in found["task2_weighing"]
