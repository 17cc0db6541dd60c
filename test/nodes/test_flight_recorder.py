"""The flight recorder without ROS: which stops it saves, how much of them, and what it leaves on a disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.reasons import Request, State
from kuavo_smolvla_ros.control.records import Decision, Inputs, JointSample
from kuavo_smolvla_ros.control.settings import settings_for
from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.flight_recorder import FlightRecorder, FlightSettings
from kuavo_smolvla_ros.nodes.flight_replay import Flight, read_flight, replay, tell
from kuavo_smolvla_ros.robot.spec import load_spec

S = 1_000_000_000
PERIOD_NS = S // 100
SPEC = load_spec("kuavo_sim")
POSE = np.array([SPEC.poses["task1_ready"].get(name, 0.3) * 0.9 for name in SPEC.action_names])
ABOUT = {
    "robot": SPEC.name,
    "fingerprint": SPEC.fingerprint,
    "limits": SPEC.limit_profile,
    "dry_run": "False",
    "node": "/executor",
    "software": "test",
}


class Loop:
    """A control loop around a recorder: time, a robot that stands where it is told to, and a policy."""

    def __init__(self, folder: Path, **bounds: Any) -> None:
        flight = {name: bounds.pop(name) for name in ("seconds", "keep", "min_free_mb") if name in bounds}
        self.core = Executor(settings_for(SPEC, **bounds))
        self.recorder = FlightRecorder(FlightSettings(folder, **{"min_free_mb": 0.0, **flight}), 100.0, ABOUT)
        self.folder = folder
        self.pose = POSE.copy()
        self.ros_ns, self.mono_ns, self.sequence = 1_760_000_000 * S, 5 * S, 0
        self.last: Decision | None = None

    def tick(self, *given: Request | ActionChunk, count: int = 1, **changes: Any) -> Decision:
        for _ in range(count):
            self.ros_ns += PERIOD_NS
            self.mono_ns += PERIOD_NS
            values: dict[str, Any] = {
                "joints": JointSample(self.ros_ns, self.mono_ns, self.pose.copy()),
                "policy_heard_ns": self.mono_ns,
                "requests": tuple(g for g in given if isinstance(g, Request)),
                "chunks": tuple(g for g in given if isinstance(g, ActionChunk)),
            }
            inputs = Inputs(self.ros_ns, self.mono_ns, **(values | changes))
            self.last = self.recorder.step(self.core, inputs)
            self.recorder.period_done(0.009)
            if self.last.command is not None:
                self.pose = self.last.command
            given = ()
        assert self.last is not None
        return self.last

    def chunk(self, reach: float = 0.2, task: str = "task1", steps: int = 30) -> ActionChunk:
        self.sequence += 1
        values = self.pose + np.linspace(0, reach, steps)[:, None] * np.sign(-self.pose)
        times = np.arange(steps, dtype=np.int64) * S // 10
        return ActionChunk(
            self.ros_ns, times, SPEC.action_names, values, task, self.sequence, SPEC.fingerprint
        )

    def stop(self, request: Request = Request.STOP) -> None:
        self.tick(request)
        for _ in range(200):
            if self.tick().state is State.HOLDING:
                return
        raise AssertionError("the arms did not come to rest")

    def files(self, count: int) -> list[Path]:
        """The files, once there are so many and nobody writes any more."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = sorted(self.folder.glob("*.mcap")) if self.folder.exists() else []
            if len(found) >= count and not list(self.folder.glob(".*")):
                return found
            time.sleep(0.005)
        raise AssertionError(f"{count} files: there are {found}, and {self.recorder.outcomes()}")


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    made: list[Loop] = []

    def make(**bounds: Any) -> Loop:
        made.append(Loop(tmp_path / "flights" / "here", **bounds))
        return made[-1]

    yield make
    for one in made:
        one.recorder.close(5.0)
    assert not [t for t in threading.enumerate() if t.name == "flight_recorder"]


def flown(loop: Loop, seconds: float = 2.0) -> Flight:
    """The flight of a loop that followed a chunk and was told to stop."""
    loop.tick(count=5)
    loop.tick(loop.chunk())
    loop.tick(count=round(seconds * 100))
    loop.stop()
    return read_flight(loop.files(1)[0])


def test_a_stop_is_written_with_time_and_reason_and_replays_to_the_same_decisions(
    loop: Callable[..., Loop],
) -> None:
    one = loop()
    flight = flown(one)
    (path,) = one.files(1)
    assert path.name.startswith("flight_2")
    assert path.name.endswith("Z_operator_stop.mcap")
    assert flight.about["reason"] == "operator_stop"
    assert flight.about["fingerprint"] == SPEC.fingerprint
    assert flight.decisions[-1]["state"] == "holding"
    assert replay(flight) is None
    assert one.recorder.outcomes() == [
        f"the stop 'operator_stop' is recorded in {path} (kuavo-smolvla replay {path})"
    ]
    assert one.recorder.last_file == path


def test_only_the_last_seconds_are_kept(loop: Callable[..., Loop]) -> None:
    flight = flown(loop(seconds=1.0), seconds=2.9)
    assert 1.0 <= flight.seconds <= 2.0
    assert flight.decisions[0]["state"] == "following"
    assert replay(flight) is None


def test_requests_decided_in_periods_of_their_own_do_not_push_the_memories_out(
    loop: Callable[..., Loop],
) -> None:
    one = loop(seconds=1.0)
    one.tick(count=30)
    for _ in range(1000):  # a service answers at once: ten periods, and no time passes
        one.mono_ns -= PERIOD_NS
        one.ros_ns -= PERIOD_NS
        one.tick(Request.RELEASE_E_STOP)
    one.stop()
    assert replay(read_flight(one.files(1)[0])) is None


def test_the_story_has_requests_refusals_states_and_limited_joints(loop: Callable[..., Loop]) -> None:
    one = loop()
    one.tick(count=5)
    one.tick(one.chunk(reach=2.0, steps=8))  # faster than any joint may go
    one.tick(count=30)
    bad = one.chunk()
    bad.values[3, 3] = np.nan
    one.tick(bad)
    one.tick(Request.UNPAUSE)
    one.stop()
    story = tell(read_flight(one.files(1)[0]))
    kinds = [(event.kind, event.text.split(":")[0]) for event in story.events]
    assert ("request", "unpause") in kinds
    assert ("answer", "refused") in kinds
    assert ("refused", "non_finite") in kinds
    assert ("request", "stop") in kinds
    assert [text for kind, text in kinds if kind == "state"][-2:] == [
        "stopping (operator_stop)",
        "holding (operator_stop)",
    ]
    assert story.accepted == 1
    assert story.refusals == {"non_finite": 1}
    assert story.limited["zarm_l4_joint"] > 10
    assert [event.time_s for event in story.events] == sorted(event.time_s for event in story.events)
    assert story.longest_period_s == pytest.approx(0.01)


def test_stops_that_go_on_by_themselves_are_not_written(loop: Callable[..., Loop]) -> None:
    one = loop(starvation_latches=False)
    one.tick(count=5)
    one.tick(one.chunk(steps=5))
    one.tick(count=100)
    assert (one.last.state, one.last.reason.value) == (State.HOLDING, "starved")
    one.tick(one.chunk())
    one.stop()
    assert [p.name.split("_", 2)[2] for p in one.files(1)] == ["operator_stop.mcap"]


def test_one_hold_is_one_file_unless_a_more_urgent_reason_comes(loop: Callable[..., Loop]) -> None:
    one = loop()
    flown(one)
    one.tick(Request.STOP)
    one.tick(count=50)
    assert len(one.files(1)) == 1
    one.tick(Request.E_STOP)
    assert one.files(2)[1].name.endswith("_e_stop.mcap")
    one.tick(Request.RELEASE_E_STOP)
    one.tick(Request.RESUME)
    one.tick(count=5)
    one.stop()
    assert one.files(3)[2].name.endswith("_operator_stop.mcap")


@pytest.mark.parametrize(("moving", "files"), [(True, 1), (False, 0)])
def test_the_end_of_the_program_is_a_stop_only_for_moving_arms(
    loop: Callable[..., Loop], moving: bool, files: int
) -> None:
    one = loop()
    one.tick(count=5)
    if moving:
        one.tick(one.chunk())
        one.tick(count=50)
    one.stop(Request.SHUTDOWN)
    one.recorder.close(10.0)
    assert len(one.files(files)) == files


def test_closing_writes_what_waits_without_rests(loop: Callable[..., Loop]) -> None:
    one = loop()
    one.tick(count=3000)
    one.stop()
    one.recorder.close(30.0)
    assert len(list(one.folder.glob("*"))) == 1
    assert len(read_flight(one.files(1)[0]).inputs) > 2900


def test_a_close_that_must_not_wait_leaves_nothing_half_written(loop: Callable[..., Loop]) -> None:
    one = loop()
    one.tick(count=3000)
    one.stop()
    one.recorder.close(0.0)
    assert list(one.folder.glob("*")) in ([], one.files(0))
    assert not list(one.folder.glob(".*"))


def test_the_oldest_go_and_what_is_not_ours_stays(loop: Callable[..., Loop]) -> None:
    one = loop(keep=3)
    one.folder.mkdir(parents=True)
    (one.folder / "mine.mcap").write_bytes(b"")
    one.tick(count=5)
    names: list[str] = []
    for _ in range(5):
        one.stop()
        deadline = time.monotonic() + 20
        while (one.recorder.last_file is None or one.recorder.last_file.name in names) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.005)
        names.append(one.recorder.last_file.name)
        one.tick(Request.RESUME)
        one.tick(count=3)
    assert sorted(p.name for p in one.folder.iterdir()) == sorted(["mine.mcap", *names[-3:]])


def test_a_full_disk_is_left_alone(loop: Callable[..., Loop]) -> None:
    one = loop(min_free_mb=1e12)
    one.tick(count=5)
    one.stop()
    one.recorder.close(10.0)
    (sentence,) = one.recorder.outcomes()
    assert "the stop 'operator_stop' is not recorded" in sentence
    assert "flight_min_free_mb" in sentence
    assert not list(one.folder.iterdir())


def test_a_folder_that_cannot_be_made_is_named_and_stops_nothing(
    loop: Callable[..., Loop], tmp_path: Path
) -> None:
    (tmp_path / "flights").write_text("a file where a folder should be")
    one = loop()
    one.tick(count=5)
    one.stop()
    one.tick(Request.RESUME)
    one.tick(one.chunk())
    assert one.tick(count=3).state is State.FOLLOWING
    one.stop()
    one.recorder.close(10.0)
    sentences = one.recorder.outcomes()
    assert len(sentences) == 2
    assert all("flights" in s and "set flight_folder" in s for s in sentences)


def test_more_stops_than_can_wait_are_told(loop: Callable[..., Loop]) -> None:
    one = loop()
    one.tick(count=500)
    for _ in range(30):
        one.stop()
        one.tick(Request.RESUME)
    one.recorder.close(30.0)
    sentences = one.recorder.outcomes()
    lost = [s for s in sentences if "others still wait" in s]
    assert len(one.files(1)) + len(lost) == 30
    assert lost


def test_a_replay_with_one_changed_number_names_the_first_difference(loop: Callable[..., Loop]) -> None:
    flight = flown(loop())
    at = next(k for k, d in enumerate(flight.decisions) if d["state"] == "following") + 20
    flight.decisions[at]["command"][3] += 1e-12
    found = replay(flight)
    assert found is not None
    assert found.period == at
    assert found.sentence.startswith("command of zarm_l4_joint: recorded ")
    assert found.time_s == pytest.approx(flight.time_s(at))


def test_the_file_is_mcap_that_others_read(loop: Callable[..., Loop]) -> None:
    from mcap.reader import make_reader

    one = loop()
    flown(one)
    (path,) = one.files(1)
    with path.open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        summary = reader.get_summary()
        assert summary is not None
        topics = {c.topic: summary.statistics.channel_message_counts[i] for i, c in summary.channels.items()}
        times = [m.log_time for _, _, m in reader.iter_messages()]
    assert topics["/flight/inputs"] == topics["/flight/decision"] > 200
    assert topics["/flight/memory"] >= 2
    assert abs(times[-1] - time.time_ns()) < 600 * S or times == sorted(times)


def read_or_sentence(path: Path) -> Flight | str:
    try:
        return read_flight(path)
    except UserError as error:
        return str(error)


def test_every_truncation_is_one_sentence(loop: Callable[..., Loop], tmp_path: Path) -> None:
    one = loop()
    flown(one, seconds=0.5)
    whole = one.files(1)[0].read_bytes()
    cut = tmp_path / "cut.mcap"

    @given(st.integers(0, len(whole) - 1))
    @settings(max_examples=60)
    def truncated(length: int) -> None:
        cut.write_bytes(whole[:length])
        found = read_or_sentence(cut)
        if isinstance(found, str):
            assert found.startswith(str(cut))
            assert "\n" not in found
        else:
            # Only the index at the end is missing: every period is there.
            assert found == read_flight(one.files(1)[0])

    truncated()


def test_every_flipped_byte_is_one_sentence_or_changes_nothing(
    loop: Callable[..., Loop], tmp_path: Path
) -> None:
    one = loop()
    flown(one, seconds=0.5)
    whole = one.files(1)[0].read_bytes()
    flight = read_flight(one.files(1)[0])
    bad = tmp_path / "bad.mcap"

    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    @settings(max_examples=60)
    def flipped(at: int, change: int) -> None:
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
        found = read_or_sentence(bad)
        if isinstance(found, str):
            assert found.startswith(str(bad))
            return
        assert (found.memory, found.inputs, found.decisions) == (
            flight.memory,
            flight.inputs,
            flight.decisions,
        )

    flipped()


def test_a_recording_of_something_else_is_refused(tmp_path: Path) -> None:
    from mcap.writer import Writer

    path = tmp_path / "other.mcap"
    with path.open("wb") as stream:
        writer = Writer(stream)
        writer.start()
        channel = writer.register_channel("/x", "json", writer.register_schema("x", "jsonschema", b"{}"))
        writer.add_message(channel, 1, b"{}", 1)
        writer.finish()
    with pytest.raises(UserError, match="is no flight recording"):
        read_flight(path)
    with open_bag(path) as bag:  # it is a whole file, so that is not the reason
        assert not bag.damages


def test_the_loop_is_charged_microseconds(loop: Callable[..., Loop]) -> None:
    """Against the executor alone, in turns; the thread's processor time is the loop's own."""
    one = loop()
    bare = Executor(settings_for(SPEC))
    one.tick(count=5)
    one.tick(one.chunk())
    costs: dict[str, list[float]] = {"bare": [], "recorded": []}
    for k in range(400):
        now = 1_760_000_000 * S + k * PERIOD_NS
        inputs = Inputs(now, k * PERIOD_NS, JointSample(now, k * PERIOD_NS, POSE), (), (), k * PERIOD_NS)
        begun = time.thread_time()
        bare.step(inputs)
        middle = time.thread_time()
        one.recorder.step(one.core, inputs)
        one.recorder.period_done(0.009)
        costs["bare"].append(middle - begun)
        costs["recorded"].append(time.thread_time() - middle)
    extra_us = (np.median(costs["recorded"]) - np.median(costs["bare"])) * 1e6
    assert extra_us < 100, f"{extra_us:.0f} us a period"
