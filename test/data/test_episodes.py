"""Recordings become episodes: known signals come out at their time, and every rule cuts where it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.data.episode import Episode, FrameSource, Rejection
from kuavo_smolvla_ros.data.episode_settings import EpisodeSettings
from kuavo_smolvla_ros.data.episodes import extract
from kuavo_smolvla_ros.data.findings import Code, Finding, Severity
from kuavo_smolvla_ros.data.recording_index import MARKER_TYPE
from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
from kuavo_smolvla_ros.data.synthetic import read_number
from kuavo_smolvla_ros.data.synthetic_bags import (
    FORMATS,
    START_NS,
    Event,
    Signal,
    blank,
    events,
    light,
    set_stamp,
    sines,
    type_store,
    write,
)
from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.images import decode_image
from kuavo_smolvla_ros.robot.serialized import peek_stamp_ns, serialized_digest
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.timeline import Observation, Timeline
from kuavo_smolvla_ros.robot.vectors import decode_state

NS = 1_000_000_000
MS = 1_000_000
SIM = light(load_spec("kuavo_sim"))
SIM_BAG = light(load_spec("kuavo_sim_bag"))
REAL_BAG = light(load_spec("kuavo_bag"))
MOBILE = light(load_spec("kuavo_mobile"))
PERIOD_NS = NS // 10
LABEL = {"task": "task1_moving_grasp", "instruction": "Pick up the moving object"}

Change = Callable[[list[Event]], list[Event]]


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    """`record(change, seconds=4)`: a recording of swinging arms, its events changed by `change`."""

    def make(
        change: Change | None = None,
        *,
        spec: RobotSpec = SIM,
        seconds: float = 4.0,
        layout: str = "mcap",
        name: str = "recording",
        extra: Any = (),
        custom_data: Any = None,
        **how: Any,
    ) -> Path:
        is_ros1 = layout.startswith("bag")
        happened = events(spec, seconds, is_ros1=is_ros1, **how)
        if change is not None:
            happened = change(happened)
        return write(
            tmp_path / (f"{name}.bag" if is_ros1 else name),
            spec,
            happened,
            layout,
            extra=extra,
            custom_data=custom_data,
        )

    return make


def take(path: Path, spec: RobotSpec = SIM, **rules: Any) -> list[Episode | Rejection]:
    found = extract(path, spec, {**LABEL, **rules})
    return [found] if isinstance(found, Rejection) else found


def only(path: Path, spec: RobotSpec = SIM, **rules: Any) -> Episode:
    (part,) = take(path, spec, trim_idle=False, **rules)
    assert isinstance(part, Episode), part.reason
    return part


def refused(path: Path, spec: RobotSpec = SIM, **rules: Any) -> Rejection:
    (part,) = take(path, spec, **rules)
    assert isinstance(part, Rejection), f"{len(part)} steps were taken"
    return part


def named(parts: list[Episode | Rejection], code: Code) -> list[Finding]:
    return [f for part in parts for f in part.findings if f.code is code]


def where(finding: Finding) -> tuple[str, str | None]:
    return finding.bag, finding.topic


def seconds_of(event: Event) -> float:
    return (event.stamp_ns - START_NS) / NS


def still(names: tuple[str, ...], _: float) -> np.ndarray:
    limits = SIM.limits(names)
    return (limits.lower + limits.upper) / 2


def moves_between(*spans: tuple[float, float]) -> Signal:
    """Arms that swing within these times and keep still otherwise."""
    swing = sines(SIM)

    def signal(names: tuple[str, ...], time_s: float) -> np.ndarray:
        clock = sum(np.clip(time_s - a, 0.0, b - a) for a, b in spans)
        return swing(names, float(clock))

    return signal


def in_order(happened: list[Event]) -> list[Event]:
    """Receipt in the order of the stamps within each stream, as one publisher's messages come."""
    newest: dict[str, int] = {}
    for event in happened:
        event.receive_ns = newest[event.stream] = max(newest.get(event.stream, 0) + 1, event.receive_ns)
    return happened


# Known signals.


@pytest.mark.parametrize("layout", FORMATS)
def test_known_signals_come_out_at_their_time_in_every_format(
    record: Callable[..., Path], layout: str
) -> None:
    spec = SIM_BAG if layout.startswith("bag") else SIM
    episode = only(record(layout=layout, spec=spec, action_delay_s=0.05), spec)
    assert len(episode) == 40
    assert set(np.diff(episode.stamps_ns)) == {PERIOD_NS}
    signal = sines(spec)
    for step, stamp in enumerate(episode.stamps_ns.tolist()):
        time_s = (stamp - START_NS) / NS
        asof = np.floor(time_s * 100 + 1e-6) / 100
        np.testing.assert_allclose(episode.state[step], signal(spec.state_names, asof), rtol=0, atol=2e-6)
        np.testing.assert_allclose(episode.action[step], signal(spec.action_names, asof + 0.05), atol=2e-6)
    for role, frames in episode.frames.items():
        assert isinstance(frames, FrameSource)
        numbers = [read_number(picture) for picture in frames]
        times = [(stamp - START_NS) / NS * 30 for stamp in episode.stamps_ns.tolist()]
        assert numbers == [int(t + 1e-6) for t in times], role


def test_recovered_phase_is_within_half_a_period_at_every_frame(record: Callable[..., Path]) -> None:
    """Jitter, lost messages and a lagging recorder do not move the signal by half a grid step anywhere."""
    rng = np.random.default_rng(3)

    def disturb(happened: list[Event]) -> list[Event]:
        kept = [e for e in happened if rng.random() > 0.1]
        for event in kept:
            backlog_s = 0.5 * np.sin(seconds_of(event)) ** 2
            event.receive_ns += int((rng.exponential(0.05) + backlog_s) * NS)
        return in_order(kept)

    episode = only(record(disturb, seconds=8.0), max_skew_s=0.2)
    signal, steps = sines(SIM), np.linspace(-0.5, 0.5, 201) / SIM.fps
    for row, stamp in zip(episode.state, episode.stamps_ns.tolist(), strict=True):
        time_s = (stamp - START_NS) / NS
        errors = [np.abs(signal(SIM.state_names, time_s + s) - row).max() for s in steps]
        assert abs(steps[int(np.argmin(errors))]) < 0.5 / SIM.fps * 0.5
        assert min(errors) < 0.02


def test_real_robots_messages_are_read(record: Callable[..., Path]) -> None:
    episode = only(record(spec=REAL_BAG, layout="bag"), REAL_BAG)
    assert episode.state.shape == (40, 16)
    np.testing.assert_allclose(episode.state[0], sines(REAL_BAG)(REAL_BAG.state_names, 0.0), atol=2e-6)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), loss=st.floats(0, 0.4), jitter_ms=st.floats(0, 30))
def test_every_step_is_the_newest_sample_of_the_past(
    tmp_path_factory: pytest.TempPathFactory, seed: int, loss: float, jitter_ms: float
) -> None:
    """Against the definition, over recordings with losses and jitter: causal, within age, within skew."""
    rng = np.random.default_rng(seed)
    happened = [e for e in events(SIM, 3.0) if rng.random() >= loss]
    for event in happened:
        event.stamp_ns += int(rng.uniform(0, jitter_ms) * MS)
        set_stamp(event.message, event.stamp_ns)
    path = write(tmp_path_factory.mktemp("bag") / "bag", SIM, happened)
    parts = take(path, trim_idle=False, min_episode_s=0.5)
    by_stream: dict[str, dict[int, Event]] = {}
    for event in sorted(happened, key=lambda e: e.receive_ns):
        by_stream.setdefault(event.stream, {}).setdefault(event.stamp_ns, event)
    for episode in (p for p in parts if isinstance(p, Episode)):
        pictures = {role: [read_number(f) for f in source] for role, source in episode.frames.items()}
        for step, t in enumerate(episode.stamps_ns.tolist()):
            newest = {n: own[max(s for s in own if s <= t)] for n, own in by_stream.items()}
            inputs = {n: e for n, e in newest.items() if SIM.streams[n].direction == "in"}
            ages = {n: t - e.stamp_ns for n, e in inputs.items()}
            assert all(age <= SIM.streams[n].max_age_s * NS for n, age in ages.items())
            assert max(ages.values()) - min(ages.values()) <= SIM.max_skew_s * NS
            messages = {n: e.message for n, e in inputs.items()}
            np.testing.assert_array_equal(episode.state[step], decode_state(SIM, messages).astype(np.float32))
            for role, camera in SIM.cameras.items():
                expected = read_number(decode_image(messages[camera.stream]))
                assert pictures[role][step] == expected


def test_live_and_offline_observations_are_the_same_bits(record: Callable[..., Path]) -> None:
    """One recording, fed to the live timeline in the order of receipt and to the converter."""
    rng = np.random.default_rng(1)

    def disturb(happened: list[Event]) -> list[Event]:
        for event in happened:
            event.receive_ns += int(rng.uniform(0, 40) * MS)
        return in_order([e for e in happened if rng.random() > 0.05])

    path = record(disturb)
    parts = [p for p in take(path, trim_idle=False, min_episode_s=0.2) if isinstance(p, Episode)]
    assert sum(map(len, parts)) > 30
    live: Timeline[Any] = Timeline.for_inputs(SIM, max_frozen_s=1.0)
    by_topic = {s.topic: s for s in SIM.inputs.values()}
    questions = [(int(t), part, step) for part in parts for step, t in enumerate(part.stamps_ns)]
    pictures = {id(part): {role: list(source) for role, source in part.frames.items()} for part in parts}
    asked = 0
    with open_bag(path) as bag:
        for message in bag.messages(by_topic):
            name, raw = by_topic[message.topic].name, bytes(message.data)
            digest = serialized_digest(raw) if "image" in name else None
            live.push(name, peek_stamp_ns(raw), message.decode(), digest, message.receive_ns)
            while asked < len(questions) and (live.settled_ns() or 0) >= questions[asked][0]:
                t, part, step = questions[asked]
                asked += 1
                seen = live.observe(t)
                assert isinstance(seen, Observation), str(seen)
                messages = {n: s.item for n, s in seen.samples.items()}
                state = decode_state(SIM, messages).astype(np.float32)
                assert state.tobytes() == part.state[step].tobytes()
                for role, camera in SIM.cameras.items():
                    picture = decode_image(messages[camera.stream])
                    assert picture.tobytes() == pictures[id(part)][role][step].tobytes()
    assert asked >= len(questions) - 2  # the last ones wait for messages that the recording does not have


# Commands.


def test_a_command_holds_until_the_next_and_nothing_stands_before_the_first(
    record: Callable[..., Path],
) -> None:
    def sparse(happened: list[Event]) -> list[Event]:
        keep = {"gripper_command": (1.23, 3.0), "arm_command": (0.0, 4.0)}
        return [
            e
            for e in happened
            if e.stream != "gripper_command" or round(seconds_of(e), 2) in keep["gripper_command"]
        ]

    path = record(sparse)
    episode = only(path)
    first = int(episode.stamps_ns[0])
    assert first >= START_NS + 1.23 * NS
    signal, grippers = sines(SIM), ("left_gripper", "right_gripper")
    columns = [SIM.action_names.index(name) for name in grippers]
    for row, stamp in zip(episode.action, episode.stamps_ns.tolist(), strict=True):
        time_s = 3.0 if stamp >= START_NS + 3 * NS else 1.23
        np.testing.assert_allclose(row[columns], signal(grippers, time_s), atol=2e-6)
    (finding,) = named([episode], Code.NO_COMMAND)
    assert where(finding) == ("recording", "/gripper/command")
    assert "1.2 s, which are cut off" in finding.sentence


def test_measured_values_stand_for_commands_nobody_gave_when_asked(record: Callable[..., Path]) -> None:
    def late(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "gripper_command" or seconds_of(e) >= 2.0]

    path = record(late)
    episode = only(path, uncommanded="measured")
    assert len(episode) == 40
    column, state = SIM.action_names.index("left_gripper"), SIM.state_names.index("left_gripper")
    np.testing.assert_array_equal(episode.action[:19, column], episode.state[:19, state])
    assert len(only(path)) < 21


def test_without_any_command_there_is_no_episode(record: Callable[..., Path]) -> None:
    part = refused(record(lambda es: [e for e in es if e.stream != "arm_command"]))
    assert "/kuavo_arm_traj: the topic is missing" in part.reason


def test_base_moves_while_the_arms_command_stream_is_silent(record: Callable[..., Path]) -> None:
    def walk(happened: list[Event]) -> list[Event]:
        silent = (1.005, 2.505)
        return [e for e in happened if e.stream != "arm_command" or not silent[0] < seconds_of(e) < silent[1]]

    episode = only(record(walk, spec=MOBILE), MOBILE)
    assert episode.action.shape == (40, 20)
    assert episode.state.shape[1] == 16
    times = (episode.stamps_ns - START_NS) / NS
    flag = episode.action[:, MOBILE.action_names.index("base_move")]
    np.testing.assert_array_equal(flag, ((times > 1.0) & (times < 2.51)).astype(np.float32))
    assert flag.sum() == 15
    arm = episode.action[:, 0]
    assert len(np.unique(arm[flag == 1])) == 1  # the last command holds, no sentinel
    assert np.isfinite(episode.action).all()


def test_a_base_needs_no_command_before_its_first_walk(record: Callable[..., Path]) -> None:
    def walk(happened: list[Event]) -> list[Event]:
        walking = (1.805, 3.005)
        return [
            e
            for e in happened
            if e.stream not in ("arm_command", "base_command")
            or (walking[0] < seconds_of(e) < walking[1]) == (e.stream == "base_command")
        ]

    episode = only(record(walk, spec=MOBILE), MOBILE)
    assert len(episode) == 40  # nothing is cut off
    assert not named([episode], Code.NO_COMMAND)
    base, flag = episode.action[:, 16:19], episode.action[:, 19]
    first = int(np.flatnonzero(np.any(base != base[0], axis=1))[0])
    assert first >= 20  # its first command stands until the second
    (walks,) = np.flatnonzero(np.diff(flag) > 0)
    assert walks == 19  # told at 1.9 s, and received a moment later
    assert flag[walks + 1 : 29].all()


def test_a_base_that_walks_before_it_is_told_to_is_cut_off(record: Callable[..., Path]) -> None:
    def walk(happened: list[Event]) -> list[Event]:
        return [
            e
            for e in happened
            if (e.stream != "arm_command" or not 0.5 < seconds_of(e) < 2.0)
            and (e.stream != "base_command" or seconds_of(e) > 1.5)
        ]

    parts = take(record(walk, spec=MOBILE), MOBILE, trim_idle=False)
    assert max(len(p) for p in parts if isinstance(p, Episode)) <= 25
    assert "/cmd_pose_world" in {finding.topic for finding in named(parts, Code.NO_COMMAND)}


def test_walking_is_not_a_standstill(record: Callable[..., Path]) -> None:
    def walk(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "arm_command" or not 2.0 < seconds_of(e) < 12.0]

    (episode,) = take(record(walk, spec=MOBILE, seconds=14.0, signal=_still_mobile), MOBILE, max_pause_s=3.0)
    assert isinstance(episode, Episode)
    assert len(episode) == pytest.approx(100 + 20, abs=2)  # the walk, and the margin of idle ends


def _still_mobile(names: tuple[str, ...], _: float) -> np.ndarray:
    limits = MOBILE.limits(names)
    return (limits.lower + limits.upper) / 2


# Cutting.


def test_idle_ends_are_cut_off_but_for_a_margin(record: Callable[..., Path]) -> None:
    path = record(seconds=10.0, signal=moves_between((3.0, 7.0)))
    (episode,) = take(path, idle_margin_s=0.5)
    assert isinstance(episode, Episode)
    first, last = ((episode.stamps_ns[[0, -1]] - START_NS) / NS).tolist()
    assert 2.4 <= first <= 2.8
    assert 7.2 <= last <= 7.6
    (finding,) = named([episode], Code.TRIMMED)
    assert "s before the first motion" in finding.sentence
    assert len(only(path)) == 100  # trim_idle=False


def test_a_long_standstill_separates_two_episodes(record: Callable[..., Path]) -> None:
    path = record(seconds=20.0, signal=moves_between((1.0, 5.0), (12.0, 18.0)))
    parts = take(path, max_pause_s=5.0)
    assert [type(p) for p in parts] == [Episode, Episode]
    assert [p.source for p in parts] == ["recording#1", "recording#2"]
    spans = [((p.stamps_ns[[0, -1]] - START_NS) / NS).tolist() for p in parts if isinstance(p, Episode)]
    assert spans[0][1] < 6.5
    assert spans[1][0] > 10.8
    (finding,) = named(parts, Code.PART)
    assert finding.bag == "recording#2"
    assert finding.at_s == pytest.approx(8.5, abs=0.6)
    (whole,) = take(path, max_pause_s=None)
    assert isinstance(whole, Episode)


def test_markers_bound_episodes_by_what_had_been_seen_when_they_came(record: Callable[..., Path]) -> None:
    store = type_store(is_ros1=False)

    def marker(text: str, time_s: float) -> tuple[str, str, int, Any]:
        message = blank(store, MARKER_TYPE)
        message.data = text
        return "/kuavo/episode", MARKER_TYPE, START_NS + int((time_s + 5) * NS), message

    def late(happened: list[Event]) -> list[Event]:
        for event in happened:
            event.receive_ns += 5 * NS  # the recorder's clock, or its backlog
        return happened

    said = [("start", 1.0), ("stop", 4.0), ("start", 5.0), ("discard", 7.0), ("start", 8.0), ("stop", 11.0)]
    path = record(late, seconds=12.0, extra=[marker(*m) for m in said])
    parts = take(path, trim_idle=False)
    spans = [((p.stamps_ns[[0, -1]] - START_NS) / NS).tolist() for p in parts if isinstance(p, Episode)]
    assert len(spans) == 2
    np.testing.assert_allclose(spans, [[1.0, 4.0], [8.0, 11.0]], atol=0.12)
    assert [p.source for p in parts] == ["recording#1", "recording#2"]
    (finding,) = named(parts, Code.DISCARDED)
    assert finding.at_s == pytest.approx(5.0, abs=0.1)
    (whole,) = take(path, trim_idle=False, marker_topic=None)
    assert isinstance(whole, Episode)


def test_a_gap_ends_the_episode_and_what_follows_is_another(record: Callable[..., Path]) -> None:
    def gap(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "left_image" or not 3.0 < seconds_of(e) < 3.6]

    path = record(gap, seconds=7.0)
    parts = take(path, trim_idle=False)
    assert [type(p) for p in parts] == [Episode, Episode]
    for part in parts:
        assert isinstance(part, Episode)
        assert set(np.diff(part.stamps_ns)) == {PERIOD_NS}  # nothing is re-timed
    (finding,) = named(parts, Code.STALE)
    assert where(finding) == ("recording", "/cam_l/color/image_raw/compressed")
    assert finding.at_s == pytest.approx(3.0, abs=0.1)  # the last observation before it
    assert "allowed are 250 ms" in finding.sentence
    part = refused(path, on_gap="reject")
    assert "on_gap is reject" in part.reason
    assert "/cam_l/color/image_raw/compressed" in part.reason


def test_a_lost_picture_ends_an_episode_unless_more_skew_is_allowed(record: Callable[..., Path]) -> None:
    def lose(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "head_image" or not 2.99 < seconds_of(e) < 3.01]

    path = record(lose, seconds=6.0)
    assert len(take(path, trim_idle=False)) == 1  # 33 ms old where the grid asks

    def lose_two(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "head_image" or not 2.96 < seconds_of(e) < 3.01]

    path = record(lose_two, seconds=6.0, name="two")
    parts = take(path, trim_idle=False)
    assert len(parts) == 2
    (finding,) = named(parts, Code.SKEWED)
    assert finding.topic == "/cam_h/color/image_raw/compressed"
    assert "67 ms before the newest of the others, allowed are 50 ms" in finding.sentence
    assert len(take(path, trim_idle=False, max_skew_s=0.1)) == 1


def test_a_long_gap_begins_a_new_grid(record: Callable[..., Path]) -> None:
    def gap(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "arm_state" or not 3.0 < seconds_of(e) < 5.5]

    parts = take(record(gap, seconds=9.0), trim_idle=False)
    assert [type(p) for p in parts] == [Episode, Episode]
    (finding,) = named(parts, Code.GAP)
    assert where(finding) == ("recording", "/kuavo/arm_state")
    assert "no message for 2.5" in finding.sentence


def test_short_parts_are_left_out_by_name(record: Callable[..., Path]) -> None:
    def gap(happened: list[Event]) -> list[Event]:
        return [e for e in happened if e.stream != "head_image" or not 1.0 < seconds_of(e) < 1.6]

    short, long = take(record(gap, seconds=6.0), trim_idle=False)
    assert isinstance(short, Rejection)
    assert isinstance(long, Episode)
    assert short.source == "recording#1"
    assert "at least 2 are asked for" in short.reason
    assert named([short], Code.TOO_SHORT)[0].severity is Severity.ERROR


def test_an_episode_in_which_nothing_moves_is_left_out(record: Callable[..., Path]) -> None:
    assert "nothing moves" in refused(record(signal=still)).reason


# What recordings say of themselves.


def custom(spec: RobotSpec, **changes: str) -> dict[str, str]:
    metadata = RecordingMetadata.of(spec, "task2_weighing", "Weigh the package")
    return {**metadata.to_custom_data(), **{f"kuavo_smolvla_ros.{k}": v for k, v in changes.items()}}


@pytest.mark.parametrize("layout", ["mcap", "sqlite3"])
def test_task_and_instruction_come_from_the_recording(record: Callable[..., Path], layout: str) -> None:
    path = record(custom_data=custom(SIM), layout=layout)
    (episode,) = extract(path, SIM, {"trim_idle": False})
    assert isinstance(episode, Episode)
    assert (episode.task, episode.instruction) == ("task2_weighing", "Weigh the package")
    assert only(path).instruction == LABEL["instruction"]  # settings go first


def test_without_a_task_a_recording_is_left_out(record: Callable[..., Path]) -> None:
    part = extract(record(), SIM, {})
    assert isinstance(part, Rejection)
    assert "does not say its task and instruction; give extract.task and extract.instruction" in part.reason
    assert part.findings[0].code is Code.NO_TASK


def test_another_robots_recording_is_refused_with_what_differs(record: Callable[..., Path]) -> None:
    part = refused(record(custom_data=custom(MOBILE)))
    assert "recorded as kuavo_mobile" in part.reason
    assert "action is 16 wide here and 20 there" in part.reason
    assert part.findings[0].code is Code.OTHER_ROBOT


def test_forged_or_newer_metadata_are_refused(record: Callable[..., Path]) -> None:
    assert "does not belong" in refused(record(custom_data=custom(SIM, fingerprint="0" * 16))).reason
    assert "version 2" in refused(record(name="b", custom_data=custom(SIM, version="2"))).reason


@pytest.mark.parametrize(
    ("given_settings", "says"),
    [
        ({"fps": 30}, "extract.fps is unknown"),
        ({"on_gap": "fill"}, "choose split or reject"),
        ({"min_episode_s": 0}, "must be above 0"),
        ({"min_episode_s": "long"}, "must be a number"),
        ({"trim_idle": 1}, "must be true or false"),
        ({"task": " "}, "is empty"),
        ({"receive_stamped": "arm_command"}, "must be a list"),
        ({"max_frozen_s": "never"}, "or null"),
    ],
)
def test_settings_are_checked_by_name(given_settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EpisodeSettings.from_mapping(given_settings)


def test_unknown_streams_in_settings_are_named(record: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="has no stream 'arms'; it has head_image, "):
        take(record(), receive_stamped=["arms"])


# The same bytes whatever happens around.


def test_extracting_twice_gives_the_same(record: Callable[..., Path]) -> None:
    path = record()
    first, second = only(path), only(path)
    assert first.state.tobytes() == second.state.tobytes()
    assert [f.to_dict() for f in first.findings] == [f.to_dict() for f in second.findings]
    for role in first.frames:
        assert [p.tobytes() for p in first.frames[role]] == [p.tobytes() for p in second.frames[role]]


def test_pictures_can_be_read_more_than_once_and_side_by_side(record: Callable[..., Path]) -> None:
    episode = only(record())
    source = episode.frames["head_cam_h"]
    assert len(source) == len(episode)
    pairs = [(a.tobytes(), b.tobytes()) for a, b in zip(source, source, strict=True)]
    assert all(a == b for a, b in pairs)


def test_a_camera_slower_than_the_grid_repeats_its_newest_picture(record: Callable[..., Path]) -> None:
    slow = replace(SIM, streams={**SIM.streams, "head_image": replace(SIM.streams["head_image"], rate_hz=5)})
    slow = replace(slow, max_skew_s=0.25)
    episode = only(record(spec=slow), slow)
    numbers = [read_number(f) for f in episode.frames["head_cam_h"]]
    assert numbers[:6] == [0, 0, 1, 1, 2, 2]
