"""The timeline as a node and an operator meet it: a robot's streams, and what is said when they fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kuavo_smolvla_ros.robot.description import Stream
from kuavo_smolvla_ros.robot.grid import Recorded, sample_grid
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.stream_buffer import RESTART_AFTER, Arrival, StreamBuffer
from kuavo_smolvla_ros.robot.timeline import Budget, NoObservation, Observation, Problem, Reason, Timeline

MS = 1_000_000
SECOND = 1_000 * MS
START = 1_700_000_000 * SECOND  # a real clock's size: float seconds would lose the nanoseconds

RATES_HZ = {"head": 30.0, "left": 30.0, "right": 30.0, "arms": 500.0, "grippers": 500.0}
LATENCIES = {"head": 30 * MS, "left": 22 * MS, "right": 25 * MS, "arms": 1 * MS, "grippers": 2 * MS}
BUDGETS = {name: Budget(250 * MS if rate == 30 else 100 * MS) for name, rate in RATES_HZ.items()}
SKEW = 50 * MS


def robot_stamps(seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Cameras out of phase with one another, everything with jitter of a tenth of its period."""
    stamps = {}
    for name, rate in RATES_HZ.items():
        count = int(seconds * rate)
        at = (np.arange(count) + rng.uniform() + rng.uniform(-0.05, 0.05, count)) / rate
        stamps[name] = START + np.round(at * 1e9).astype(np.int64)
    return stamps


def play(
    live: Timeline[int], stamps: dict[str, np.ndarray], until_ns: int, tick_ns: int
) -> list[Observation[int] | NoObservation]:
    """Deliver each sample its stream's latency after its stamp, and ask for the latest at every tick."""
    arrivals = sorted(
        (int(stamp) + LATENCIES[name], name, int(stamp), item)
        for name, series in stamps.items()
        for item, stamp in enumerate(series)
    )
    outcomes, at = [], 0
    for now in range(START, until_ns, tick_ns):
        while at < len(arrivals) and arrivals[at][0] <= now:
            arrived, name, stamp, item = arrivals[at]
            live.push(name, stamp, item, now_ns=arrived)
            at += 1
        outcomes.append(live.latest(now))
    return outcomes


def test_a_healthy_robot_is_seen_at_every_tick_and_as_recorded() -> None:
    stamps = robot_stamps(4.0, np.random.default_rng(0))
    outcomes = play(Timeline(BUDGETS, SKEW), stamps, START + 3900 * MS, 100 * MS)
    seen = [outcome for outcome in outcomes if isinstance(outcome, Observation)]
    assert len(outcomes) == 39
    assert all(
        isinstance(outcome, Observation) for outcome in outcomes[2:]
    )  # the first pictures need 30 ms to come

    recorded = {name: Recorded(series) for name, series in stamps.items()}
    times = np.array([outcome.t_ns for outcome in seen])
    offline = sample_grid(recorded, BUDGETS, SKEW, times)
    assert offline.usable.all()
    for name in RATES_HZ:
        assert offline.picks[name].tolist() == [outcome.samples[name].item for outcome in seen]
    assert max(outcome.skew_ns for outcome in seen) <= 37 * MS  # one camera period and its jitter
    assert max(outcome.age_ns("arms") for outcome in seen) <= 3 * MS


def test_observation_time_lags_by_no_more_than_a_frame_and_its_latency() -> None:
    stamps = robot_stamps(2.0, np.random.default_rng(1))
    now = START + 1900 * MS
    outcome = play(Timeline(BUDGETS, SKEW), stamps, now + 1, 100 * MS)[-1]
    assert isinstance(outcome, Observation)
    assert now - outcome.t_ns <= 30 * MS + 37 * MS


def test_over_lost_frames_live_and_recorded_refuse_the_same_times() -> None:
    stamps = robot_stamps(2.0, np.random.default_rng(2))
    before, after = int(stamps["left"][27]), int(stamps["left"][30])
    stamps["left"] = np.delete(stamps["left"], [28, 29])
    outcomes = play(Timeline(BUDGETS, SKEW), stamps, START + 1800 * MS, 5 * MS)[20:]
    times = np.array([outcome.t_ns for outcome in outcomes])
    seen = np.array([isinstance(outcome, Observation) for outcome in outcomes])
    recorded = {name: Recorded(series) for name, series in stamps.items()}
    assert np.array_equal(sample_grid(recorded, BUDGETS, SKEW, times).usable, seen)

    in_the_hole = (times > before + SKEW + 2 * MS) & (times < after)
    assert in_the_hole.any()
    assert not seen[in_the_hole].any()
    refused = [outcome for outcome in outcomes if isinstance(outcome, NoObservation)]
    assert {(outcome.reason, outcome.stream) for outcome in refused} == {(Reason.SKEWED, "left")}
    assert (times[1:] >= times[:-1]).all()


@pytest.mark.parametrize("dead", list(RATES_HZ))
def test_a_stream_that_ends_is_named_once_it_is_too_old(dead: str) -> None:
    stamps = robot_stamps(2.0, np.random.default_rng(3))
    end = START + 1000 * MS
    stamps[dead] = stamps[dead][stamps[dead] < end]
    last = int(stamps[dead][-1])
    live: Timeline[int] = Timeline(BUDGETS, SKEW)
    outcomes = play(live, stamps, START + 1900 * MS, 10 * MS)
    final = outcomes[-1]
    assert isinstance(final, NoObservation)
    assert (final.reason, final.stream) == (Reason.STALE, dead)
    limit_ns = BUDGETS[dead].max_age_ns
    late = [
        START + i * 10 * MS
        for i, o in enumerate(outcomes)
        if isinstance(o, Observation) and START + i * 10 * MS > end
    ]
    assert limit_ns is not None
    assert not late or max(late) <= last + limit_ns
    assert len(final.problems) == 1, str(final)


def test_nothing_at_all_names_every_stream() -> None:
    outcome = Timeline[int](BUDGETS, SKEW).latest(START)
    assert isinstance(outcome, NoObservation)
    assert [(p.reason, p.stream) for p in outcome.problems] == [(Reason.MISSING, name) for name in BUDGETS]
    assert "head: no sample with a stamp at or before this time; left: no sample" in str(outcome)


def test_sentences_have_the_numbers() -> None:
    live: Timeline[str] = Timeline({"head": Budget(250 * MS), "arms": Budget(100 * MS)}, SKEW)
    live.push("head", START, "h")
    live.push("arms", START + 61 * MS, "a")
    skewed = live.observe(START + 61 * MS)
    assert str(skewed) == "head: its sample lies 61 ms before the newest of the others, allowed are 50 ms"
    stale = live.latest(START + 412 * MS)
    assert str(stale) == (
        "head: its sample is 412 ms old, allowed are 250 ms; "
        "arms: its sample is 351 ms old, allowed are 100 ms"
    )


def test_a_stamp_that_does_not_advance_ages_and_is_explained() -> None:
    live: Timeline[int] = Timeline({"head": Budget(250 * MS)}, SKEW)
    for i in range(20):
        live.push("head", START, i, now_ns=START + i * 33 * MS)
    outcome = live.latest(START + 20 * 33 * MS)
    assert isinstance(outcome, NoObservation)
    assert outcome.reason is Reason.STALE
    assert "19 messages since then repeat its stamp: the driver is stuck" in str(outcome)
    assert live.buffers["head"].counts == {Arrival.NEWEST: 1, Arrival.REPEATED: 19}
    live.push("head", START + 700 * MS, 20)
    assert isinstance(live.latest(START + 700 * MS), Observation)
    assert str(live.latest(START + 1000 * MS)) == "head: its sample is 300 ms old, allowed are 250 ms"


def test_limits_are_inclusive() -> None:
    live: Timeline[str] = Timeline({"a": Budget(100 * MS), "b": Budget(100 * MS)}, SKEW)
    live.push("a", START, "a")
    live.push("b", START + SKEW, "b")
    assert isinstance(live.observe(START + 100 * MS), Observation)
    assert isinstance(live.observe(START + 100 * MS + 1), NoObservation)
    live.push("b", START + SKEW + 1, "b")
    outcome = live.observe(START + 100 * MS)
    assert isinstance(outcome, NoObservation)
    assert outcome.problems == (Problem(Reason.SKEWED, "a", SKEW + 1, SKEW),)


def test_nothing_from_the_future_is_chosen() -> None:
    live: Timeline[str] = Timeline({"a": Budget(100 * MS)}, SKEW)
    live.push("a", START, "past")
    live.push("a", START + 1, "future")
    outcome = live.observe(START)
    assert isinstance(outcome, Observation)
    assert outcome.samples["a"].item == "past"


# ---- stamps that cannot be


@pytest.mark.parametrize("stamp", [0, -1, -(10**18)])
def test_unset_stamp_is_refused_and_counted(stamp: int) -> None:
    live: Timeline[str] = Timeline({"a": Budget(100 * MS)}, SKEW)
    assert live.push("a", stamp, "x", now_ns=START) is Arrival.UNSTAMPED
    assert isinstance(live.latest(START), NoObservation)
    assert live.buffers["a"].counts[Arrival.UNSTAMPED] == 1


def test_stamp_from_the_future_is_refused_beyond_the_tolerance() -> None:
    live: Timeline[str] = Timeline({"a": Budget(100 * MS)}, SKEW, future_tolerance_ns=20 * MS)
    assert live.push("a", START + 20 * MS, "x", now_ns=START) is Arrival.NEWEST
    assert live.push("a", START + 20 * MS + 1, "y", now_ns=START) is Arrival.FUTURE
    outcome = live.latest(START)  # accepted, but still not shown before its time
    assert isinstance(outcome, NoObservation)
    assert live.settled_ns() == START + 20 * MS


def test_one_odd_stamp_does_not_wipe_a_stream_but_a_clock_set_back_restarts_it() -> None:
    buffer: StreamBuffer[int] = StreamBuffer("a", 250 * MS)
    for i in range(10):
        buffer.push(START + i * 2 * MS, i)
    assert buffer.push(5 * SECOND, 99) is Arrival.BEHIND
    assert buffer.push(START + 20 * MS, 10) is Arrival.NEWEST
    later = [buffer.push(5 * SECOND + i * 2 * MS, i) for i in range(RESTART_AFTER + 1)]
    assert later == [Arrival.BEHIND] * (RESTART_AFTER - 1) + [Arrival.RESTARTED, Arrival.NEWEST]
    assert buffer.newest_ns == 5 * SECOND + RESTART_AFTER * 2 * MS
    assert buffer.asof(START + SECOND) == buffer.asof(6 * SECOND)  # nothing of before is left


def test_a_stamp_far_ahead_heals_without_a_clock_to_compare() -> None:
    buffer: StreamBuffer[int] = StreamBuffer("a", 250 * MS)
    buffer.push(START + 10**9 * SECOND, -1)
    for i in range(RESTART_AFTER):
        buffer.push(START + i * MS, i)
    assert buffer.newest_ns == START + (RESTART_AFTER - 1) * MS


def test_after_the_clock_is_set_back_no_observation_mixes_the_two_times() -> None:
    """A simulation reset: every stream starts anew, one after the other."""
    live: Timeline[str] = Timeline({"a": Budget(100 * MS), "b": Budget(100 * MS)}, SKEW)
    for i in range(200):
        live.push("a", 10 * SECOND + i * MS, "before")
        live.push("b", 10 * SECOND + i * MS, "before")
    for i in range(1, 10):
        live.push("a", i * MS, "after", now_ns=i * MS)
        outcome = live.latest(i * MS)
        assert isinstance(outcome, NoObservation)
        assert {p.reason for p in outcome.problems} == {Reason.FORGOTTEN}
    for i in range(10, 20):
        live.push("a", i * MS, "after", now_ns=i * MS)
        live.push("b", i * MS, "after", now_ns=i * MS)
    outcome = live.latest(20 * MS)
    assert isinstance(outcome, Observation)
    assert {sample.item for sample in outcome.samples.values()} == {"after"}


def test_clear_forgets_samples_and_keeps_counts() -> None:
    live: Timeline[str] = Timeline({"a": Budget(100 * MS)}, SKEW)
    live.push("a", START, "x")
    live.clear()
    assert live.settled_ns() is None
    outcome = live.latest(START)
    assert isinstance(outcome, NoObservation)
    assert outcome.reason is Reason.FORGOTTEN
    assert live.buffers["a"].counts[Arrival.NEWEST] == 1
    assert live.push("a", 5, "y") is Arrival.NEWEST  # time may start again anywhere


def test_asking_too_far_back_says_so() -> None:
    live: Timeline[int] = Timeline({"a": Budget(100 * MS)}, SKEW)
    for i in range(1000):
        live.push("a", START + i * MS, i)
    outcome = live.observe(START + 500 * MS)
    assert isinstance(outcome, NoObservation)
    assert outcome.reason is Reason.FORGOTTEN
    assert "too long ago" in str(outcome)


def test_memory_is_bounded() -> None:
    live: Timeline[int] = Timeline(BUDGETS, SKEW)
    for i in range(20_000):
        live.push("arms", START + i * 2 * MS, i)
    assert len(live.buffers["arms"]._samples) <= 250 / 2 + 20 / 2 + 2


# ---- budgets


def test_a_held_value_never_ages_skews_or_delays() -> None:
    live: Timeline[str] = Timeline({"arms": Budget(100 * MS), "command": Budget(None)}, SKEW)
    live.push("command", START - 60 * SECOND, "old")
    for i in range(1000):
        live.push("arms", START + i * 2 * MS, "a")
    outcome = live.latest(START + 2 * SECOND)
    assert isinstance(outcome, Observation)
    assert outcome.samples["command"].item == "old"
    assert outcome.skew_ns == 0
    assert outcome.t_ns == START + 1998 * MS


def test_without_any_age_limit_time_is_unknown() -> None:
    with pytest.raises(ValueError, match="needs an age limit"):
        Timeline({"command": Budget(None)}, SKEW)


@pytest.mark.parametrize("limit", [0, -1])
def test_budgets_that_admit_nothing_are_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="admits nothing"):
        Budget(limit)
    with pytest.raises(ValueError, match="admits nothing"):
        Budget(5, limit)


def test_reordering_beyond_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a memory of at least that"):
        StreamBuffer("a", 10, max_reorder_ns=11)


def test_unknown_stream_is_a_fault() -> None:
    with pytest.raises(KeyError):
        Timeline[int](BUDGETS, SKEW).push("torso", START, 0)


def test_budgets_come_from_the_robots_description() -> None:
    spec = load_spec("kuavo_sim")
    live: Timeline[object] = Timeline.for_inputs(spec, max_frozen_s=0.5)
    assert set(live.budgets) == set(spec.inputs)
    assert live.max_skew_ns == round(spec.max_skew_s * 1e9)
    pictures = {camera.stream for camera in spec.cameras.values()}
    for name, stream in spec.inputs.items():
        assert live.budgets[name].max_age_ns == round(stream.max_age_s * 1e9)
        assert live.budgets[name].max_frozen_ns == (500 * MS if name in pictures else None)
    unwatched: Timeline[object] = Timeline.for_inputs(spec)
    assert {budget.max_frozen_ns for budget in unwatched.budgets.values()} == {None}


def test_an_endless_age_is_a_held_value() -> None:
    stream = Stream("command", "/c", "sensor_msgs/msg/JointState", "out", 100.0, math.inf)
    assert Budget.of(stream) == Budget(None)
