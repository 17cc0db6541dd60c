"""What converters of such recordings get wrong, and what recordings do to them: each a test of that name.

First the faults of the converter that teams used before, then every kind of bad recording. Of the latter the
report must name recording, topic and time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.data.episode import Episode, Rejection
from kuavo_smolvla_ros.data.episodes import extract
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
from kuavo_smolvla_ros.data.synthetic import read_number
from kuavo_smolvla_ros.data.synthetic_bags import START_NS, Event, events, light, set_stamp, sines, write
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.spec import load_spec

NS = 1_000_000_000
SIM, MOBILE, REAL = (light(load_spec(name)) for name in ("kuavo_sim", "kuavo_mobile", "kuavo_bag"))
LABEL = {"task": "task1_moving_grasp", "instruction": "Pick up the moving object", "trim_idle": False}
HEAD = "/cam_h/color/image_raw/compressed"

Change = Callable[[list[Event]], Any]


def seconds_of(event: Event) -> float:
    return (event.stamp_ns - START_NS) / NS


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., list[Episode | Rejection]]:
    """`convert(change)`: what becomes of a recording whose events `change` has altered."""

    def run(
        change: Change | None = None,
        *,
        spec: RobotSpec = SIM,
        read_as: RobotSpec | None = None,
        seconds: float = 4.0,
        layout: str = "mcap",
        rules: dict[str, Any] | None = None,
        **how: Any,
    ) -> list[Episode | Rejection]:
        happened = events(spec, seconds, is_ros1=layout.startswith("bag"), **how)
        if change is not None:
            happened = change(happened) or happened
        suffix = ".bag" if layout.startswith("bag") else ""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        path = write(folder / f"recording{suffix}", spec, happened, layout)
        found = extract(path, read_as or spec, {**LABEL, **(rules or {})})
        return [found] if isinstance(found, Rejection) else found

    return run


def episodes_of(parts: list[Episode | Rejection]) -> list[Episode]:
    return [p for p in parts if isinstance(p, Episode)]


def finding(parts: list[Episode | Rejection], code: Code, topic: str | None = None) -> Finding:
    """The one finding of this kind (about this topic)."""
    found = [f for p in parts for f in p.findings if f.code is code and (topic is None or f.topic == topic)]
    assert len(found) == 1, [str(f) for p in parts for f in p.findings if f.code is not Code.STREAM]
    assert json.loads(json.dumps(found[0].to_dict())) == found[0].to_dict()
    return found[0]


def assert_located(found: Finding, topic: str, at_s: float, within_s: float = 0.15) -> None:
    assert found.bag == "recording"
    assert found.topic == topic
    assert found.time_ns is not None
    assert found.at_s == pytest.approx(at_s, abs=within_s)


# What the converter before this one gets wrong.


def test_alignment_is_causal_and_bounded_in_age(convert: Callable[..., Any]) -> None:
    """Not nearest neighbour: a picture just after the grid time is not taken, one too old neither."""

    def late_camera(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "head_image":
                event.stamp_ns += 1_000_000  # a millisecond after the grid that the others begin
                set_stamp(event.message, event.stamp_ns)

    (episode,) = episodes_of(convert(late_camera, rules={"max_skew_s": 0.1}))
    offset_ms = int((episode.stamps_ns[0] - START_NS) // 1_000_000)
    assert offset_ms == 1
    seen = [read_number(f) for f in episode.frames["head_cam_h"]]
    assert seen == [3 * step for step in range(len(seen))]


def test_nothing_is_extrapolated_past_a_stream_that_ended(convert: Callable[..., Any]) -> None:
    def stops(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "head_image" or seconds_of(e) < 2.5]

    (episode,) = episodes_of(convert(stops))
    assert 2.4 <= (episode.stamps_ns[-1] - START_NS) / NS <= 2.5


def test_a_camera_that_drops_pictures_does_not_bend_time(convert: Callable[..., Any]) -> None:
    """The grid is time, not every third picture: at 25 Hz with losses, picture and state belong together."""
    rng = np.random.default_rng(0)

    def lossy(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "head_image" or rng.random() > 0.2]

    (episode,) = episodes_of(convert(lossy, rates_hz={"head_image": 25.0}, rules={"max_skew_s": 0.25}))
    assert len(episode) >= 38
    signal = sines(SIM)
    numbers = [read_number(f) for f in episode.frames["head_cam_h"]]
    for row, stamp, number in zip(episode.state, episode.stamps_ns.tolist(), numbers, strict=True):
        time_s = (stamp - START_NS) / NS
        assert 0 <= time_s - number / 25 < 0.25
        np.testing.assert_allclose(
            row, signal(SIM.state_names, np.floor(time_s * 100 + 1e-6) / 100), atol=2e-6
        )


def test_header_stamps_are_used_and_not_the_times_of_receipt(convert: Callable[..., Any]) -> None:
    """The recorder lags more and more, and differently per topic; the result is the same."""

    def lag(happened: list[Event]) -> None:
        for event in happened:
            share = 0.4 if "image" in event.stream else 0.05
            event.receive_ns += int(share * (event.stamp_ns - START_NS))

    (calm,) = episodes_of(convert())
    parts = convert(lag, layout="sqlite3")
    (lagging,) = episodes_of(parts)
    assert calm.state.tobytes() == lagging.state.tobytes()
    assert calm.action.tobytes() == lagging.action.tobytes()
    found = finding(parts, Code.BACKLOG, HEAD)
    assert_located(found, HEAD, 3.96, 0.1)
    assert "1.5" in found.sentence
    assert "the recorder lagged" in found.sentence


def test_a_failed_recording_touches_no_other(tmp_path: Path) -> None:
    """No state is shared: what is extracted before and after a bad one is what is extracted alone."""
    good, other = tmp_path / "good", tmp_path / "other"
    write(good, SIM, events(SIM, 3.0))
    write(other, SIM, events(SIM, 3.0, start_ns=START_NS + 100 * NS))
    bad = write(tmp_path / "bad", SIM, _half_broken(events(SIM, 3.0)))
    alone = extract(other, SIM, LABEL)
    extract(good, SIM, LABEL)
    broken = extract(bad, SIM, LABEL)
    after = extract(other, SIM, LABEL)
    assert isinstance(alone, list)
    assert isinstance(after, list)
    assert not [p for p in (broken if isinstance(broken, list) else [broken]) if isinstance(p, Episode)]
    assert [len(p) for p in episodes_of(after)] == [len(p) for p in episodes_of(alone)] == [30]
    assert episodes_of(after)[0].state.tobytes() == episodes_of(alone)[0].state.tobytes()


def _half_broken(happened: list[Event]) -> list[Event]:
    for event in happened:
        if event.stream == "arm_state" and seconds_of(event) > 1.0:
            event.message.position[3] = np.nan
    return happened


def test_every_recording_has_its_own_task(tmp_path: Path) -> None:
    """Not one task string per run."""
    found = []
    for task, sentence in (("task1_moving_grasp", "Grasp it"), ("task3_placement", "Place it")):
        note = RecordingMetadata.of(SIM, task, sentence).to_custom_data()
        path = write(tmp_path / task, SIM, events(SIM, 2.5), custom_data=note)
        (episode,) = episodes_of(extract(path, SIM, {"trim_idle": False}))
        found.append((episode.task, episode.instruction))
    assert found == [("task1_moving_grasp", "Grasp it"), ("task3_placement", "Place it")]


def test_gaps_of_the_base_task_hold_no_sentinel(convert: Callable[..., Any]) -> None:
    def walk(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "arm_command" or not 1.0 < seconds_of(e) < 3.0]

    (episode,) = episodes_of(convert(walk, spec=MOBILE))
    limits = MOBILE.limits(MOBILE.action_names)
    assert (episode.action >= limits.lower - 1e-6).all()
    assert (episode.action <= limits.upper + 1e-6).all()
    assert set(np.unique(episode.action[:, -1])) == {0.0, 1.0}


def test_a_dead_camera_is_not_served_on(convert: Callable[..., Any]) -> None:
    """One picture over and over with fresh stamps passes every age check."""

    def freeze(happened: list[Event]) -> None:
        frozen = None
        for event in happened:
            if event.stream == "right_image" and seconds_of(event) >= 2.5:
                frozen = event.message.data if frozen is None else frozen
                event.message.data = frozen

    topic = "/cam_r/color/image_raw/compressed"
    parts = convert(freeze, seconds=6.0)
    (episode,) = episodes_of(parts)
    assert (episode.stamps_ns[-1] - START_NS) / NS <= 3.6
    figures = finding(parts, Code.STREAM, topic).data
    assert figures is not None
    assert figures["repeated_pictures"] == 104
    (whole,) = episodes_of(convert(freeze, seconds=6.0, rules={"max_frozen_s": None}, layout="sqlite3"))
    assert len(whole) == 60


def test_depth_is_refused_and_not_squeezed_into_a_picture(convert: Callable[..., Any]) -> None:
    def depth(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "head_image":
                event.message.format = "16UC1; compressedDepth png"

    (episode,) = episodes_of(convert(depth))
    with pytest.raises(UserError, match="a depth picture, which cannot be read as colour"):
        list(episode.frames["head_cam_h"])


# What recordings are like.


def test_empty_recording(tmp_path: Path) -> None:
    for path, code in (
        (write(tmp_path / "empty", SIM, []), Code.EMPTY),
        (write(tmp_path / "empty.bag", SIM, [], "bag"), Code.EMPTY),
        (tmp_path / "zero.mcap", Code.UNREADABLE),
    ):
        if code is Code.UNREADABLE:
            path.write_bytes(b"")
        rejection = extract(path, SIM, LABEL)
        assert isinstance(rejection, Rejection)
        assert rejection.findings[0].code is code
        assert rejection.findings[0].bag == path.name
        assert "empty" in rejection.reason


def test_missing_topic(convert: Callable[..., Any]) -> None:
    parts = convert(lambda happened: [e for e in happened if e.stream != "head_image"])
    assert not episodes_of(parts)
    found = finding(parts, Code.MISSING_TOPIC)
    assert (found.bag, found.topic, found.severity) == ("recording", HEAD, Severity.ERROR)
    assert found.sentence == "the topic is missing"
    assert str(found) == f"recording {HEAD}: the topic is missing"
    moved = replace(SIM.streams["head_image"], topic="/cam_head/color/image_raw/compressed")
    read_as = replace(SIM, streams={**SIM.streams, "head_image": moved})
    found = finding(convert(read_as=read_as), Code.MISSING_TOPIC)
    assert f"the topic is missing; there is {HEAD}" in found.sentence


def test_recording_of_another_description_is_pointed_to_it(convert: Callable[..., Any]) -> None:
    shipped = load_spec("kuavo")
    parts = convert(spec=REAL, read_as=shipped, layout="bag", seconds=1.0)
    (rejection,) = parts
    assert isinstance(rejection, Rejection)
    assert "the description 'kuavo_bag' fits this recording" in rejection.reason


def test_wrong_type(convert: Callable[..., Any]) -> None:
    declared = replace(SIM.streams["gripper_state"], type="kuavo_msgs/msg/lejuClawState")
    read_as = replace(SIM, streams={**SIM.streams, "gripper_state": declared})
    found = finding(convert(read_as=read_as), Code.WRONG_TYPE)
    assert (found.bag, found.topic) == ("recording", "/gripper/state")
    assert (
        "its type is sensor_msgs/msg/JointState, declared is kuavo_msgs/msg/lejuClawState" in found.sentence
    )


def test_stamps_of_zero(convert: Callable[..., Any]) -> None:
    def unstamp(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "arm_command":
                set_stamp(event.message, 0)

    parts = convert(unstamp)
    assert not episodes_of(parts)
    assert "extract.receive_stamped=[arm_command]" in parts[0].reason
    found = [f for f in parts[0].findings if f.code is Code.UNSTAMPED]
    assert {(f.bag, f.topic) for f in found} == {("recording", "/kuavo_arm_traj")}
    assert found[-1].count == 400
    assert found[-1].at_s == pytest.approx(0.0, abs=0.01)
    (episode,) = episodes_of(convert(unstamp, layout="sqlite3", rules={"receive_stamped": ["arm_command"]}))
    assert len(episode) == 39  # receipt is 4 ms after the stamp, so the first grid time has no command


def test_a_few_stamps_of_zero(convert: Callable[..., Any]) -> None:
    def unstamp(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "arm_state" and 1.0 < seconds_of(event) < 1.045:
                set_stamp(event.message, 0)

    parts = convert(unstamp)
    assert [len(e) for e in episodes_of(parts)] == [40]
    assert_located(finding(parts, Code.UNSTAMPED), "/kuavo/arm_state", 1.01)
    assert finding(parts, Code.UNSTAMPED).count == 4


def test_clock_jump_back(convert: Callable[..., Any]) -> None:
    def jump(happened: list[Event]) -> None:
        for event in happened:
            if seconds_of(event) >= 3.0:
                event.stamp_ns -= 100 * NS
                set_stamp(event.message, event.stamp_ns)

    parts = convert(jump, seconds=7.0)
    assert [len(e) for e in episodes_of(parts)] == [pytest.approx(30, abs=2), pytest.approx(40, abs=2)]
    for episode in episodes_of(parts):
        assert set(np.diff(episode.stamps_ns)) == {NS // 10}
    found = finding(parts, Code.CLOCK_JUMP)
    assert found.bag == "recording"
    assert HEAD in (found.topic or "")
    assert found.at_s == pytest.approx(3.0, abs=0.2)


def test_clock_jump_forward_by_years(convert: Callable[..., Any]) -> None:
    """A grid over the years between would not fit into memory."""

    def jump(happened: list[Event]) -> None:
        for event in happened:
            if seconds_of(event) < 3.0:
                event.stamp_ns -= 1_600_000_000 * NS
                set_stamp(event.message, event.stamp_ns)

    parts = convert(jump, seconds=7.0)
    assert [len(e) for e in episodes_of(parts)] == [30, 40]
    found = finding(parts, Code.GAP)
    assert found.bag == "recording"
    assert found.topic is not None
    assert found.time_ns is not None
    assert found.at_s == pytest.approx(3.0, abs=0.15)
    assert "s without an observation" in found.sentence


def test_a_single_stamp_from_the_future(convert: Callable[..., Any]) -> None:
    def odd(happened: list[Event]) -> None:
        (one,) = (e for e in happened if e.stream == "arm_state" and e.stamp_ns == START_NS + 2 * NS)
        set_stamp(one.message, one.stamp_ns + 3600 * NS)

    parts = convert(odd)
    assert [len(e) for e in episodes_of(parts)] == [40]
    found = finding(parts, Code.ODD_STAMP)
    assert_located(found, "/kuavo/arm_state", 2.0)
    assert found.count == 1
    assert "3600.0 s off" in found.sentence


def test_clocks_that_disagree_between_machines(convert: Callable[..., Any]) -> None:
    def offset(happened: list[Event]) -> None:
        for event in happened:
            if "image" in event.stream:
                event.stamp_ns -= 2 * NS
                set_stamp(event.message, event.stamp_ns)

    parts = convert(offset)
    found = finding(parts, Code.CLOCK_OFFSET, HEAD)
    assert "2.00 s throughout" in found.sentence
    assert found.bag == "recording"


def test_two_episodes_in_one_bag(convert: Callable[..., Any]) -> None:
    def quiet(happened: list[Event]) -> list[Event]:
        return [e for e in happened if not 4.0 < seconds_of(e) < 9.0]

    parts = convert(quiet, seconds=13.0)
    assert [(p.source, len(p)) for p in episodes_of(parts)] == [("recording#1", 41), ("recording#2", 40)]
    found = finding(parts, Code.GAP)
    assert found.topic in {stream.topic for stream in SIM.inputs.values()}
    assert_located(found, found.topic or "", 4.0)


def test_nan_states(convert: Callable[..., Any]) -> None:
    def poison(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "arm_state" and 2.95 < seconds_of(event) < 3.15:
                event.message.position[2] = np.nan

    parts = convert(poison, seconds=7.0)
    assert [len(e) for e in episodes_of(parts)] == [30, 38]
    found = [f for p in parts for f in p.findings if f.code is Code.NOT_FINITE]
    assert_located(found[0], "/kuavo/arm_state", 3.0)
    assert "zarm_l3_joint is nan" in found[0].sentence
    assert max(f.count for f in found) == 2
    for episode in episodes_of(parts):
        assert np.isfinite(episode.state).all()


def test_infinite_commands(convert: Callable[..., Any]) -> None:
    def poison(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "arm_command" and seconds_of(event) >= 3.0:
                event.message.position[0] = np.inf

    parts = convert(poison)
    (episode,) = episodes_of(parts)
    assert len(episode) == 30
    found = finding(parts, Code.NOT_FINITE)
    assert_located(found, "/kuavo_arm_traj", 3.0)


def test_truncated_jpeg(convert: Callable[..., Any]) -> None:
    def cut(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "head_image" and event.stamp_ns == START_NS + 3 * NS:
                event.message.data = event.message.data[: len(event.message.data) // 2]

    parts = convert(cut, seconds=7.0)
    assert [len(e) for e in episodes_of(parts)] == [30, 39]
    found = [f for p in parts for f in p.findings if f.code is Code.BAD_PICTURE]
    assert_located(found[0], HEAD, 3.0)
    assert "truncated JPEG" in found[0].sentence
    for episode in episodes_of(parts):
        assert len(list(episode.frames["head_cam_h"])) == len(episode)


def test_picture_of_another_size_than_declared(convert: Callable[..., Any]) -> None:
    wide = np.frombuffer(encode_jpeg(np.zeros((48, 85, 3), np.uint8)), np.uint8)

    def widen(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "left_image":
                event.message.data = wide

    parts = convert(widen, rules={"max_frozen_s": None})
    assert not episodes_of(parts)
    assert "wrist_cam_l is 85x48, declared is 64x48" in parts[0].reason
    found = [f for f in parts[0].findings if f.code is Code.WRONG_SIZE]
    assert_located(found[0], "/cam_l/color/image_raw/compressed", 0.0)


def test_damaged_messages(convert: Callable[..., Any]) -> None:
    def cut(happened: list[Event]) -> None:
        for event in happened:
            if event.stream == "arm_state" and event.stamp_ns == START_NS + 3 * NS:
                event.message.position = event.message.position[:5]

    parts = convert(cut, seconds=7.0)
    assert [len(e) for e in episodes_of(parts)] == [30, 39]
    found = [f for p in parts for f in p.findings if f.code is Code.UNDECODABLE]
    assert_located(found[0], "/kuavo/arm_state", 3.0)


def test_streams_with_no_time_in_common(convert: Callable[..., Any]) -> None:
    def apart(happened: list[Event]) -> None:
        for event in happened:
            if "image" in event.stream:
                event.stamp_ns -= 3600 * NS
                set_stamp(event.message, event.stamp_ns)

    parts = convert(apart)
    assert not episodes_of(parts)
    assert "no time in common" in parts[0].reason
    assert finding(parts, Code.CLOCK_OFFSET, HEAD).bag == "recording"


def test_truncated_recording_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "whole", light(load_spec("kuavo_sim"), 144, 192), events(_wide(), 6.0))
    file = path / "whole.mcap"
    file.write_bytes(file.read_bytes()[: int(0.8 * file.stat().st_size)])
    found = extract(path, _wide(), LABEL)
    assert isinstance(found, list)
    (episode,) = episodes_of(found)
    assert 20 < len(episode) < 50
    damaged = [f for f in episode.findings if f.code is Code.DAMAGED]
    assert damaged[0].bag == "whole"
    assert damaged[0].at_s is not None
    assert damaged[0].at_s == pytest.approx(len(episode) / 10, abs=0.3)
    assert "recorder did not finish" in damaged[0].sentence


def _wide() -> RobotSpec:
    return light(load_spec("kuavo_sim"), 144, 192)


def test_low_rate(convert: Callable[..., Any]) -> None:
    parts = convert(rates_hz={"head_image": 15.0}, rules={"max_skew_s": 0.1})
    found = finding(parts, Code.LOW_RATE)
    assert (found.bag, found.topic) == ("recording", HEAD)
    assert "15.0 Hz, declared are 30" in found.sentence


def test_no_clean_recording_has_more_to_say_than_its_figures(convert: Callable[..., Any]) -> None:
    parts = convert()
    assert [f for p in parts for f in p.findings if f.severity is not Severity.INFO] == []
    assert len([f for p in parts for f in p.findings if f.code is Code.STREAM]) == 7
