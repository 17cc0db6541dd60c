"""The forecast of the next observation's pictures, held against the observation that is then made."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.nodes.ahead import next_pictures, period_ns
from kuavo_smolvla_ros.robot.timeline import Budget, Observation, StreamBuffer, Timeline

MS = 1_000_000
CAMERAS = ("left", "middle", "right")
BUDGETS = {name: Budget(250 * MS) for name in CAMERAS} | {"joints": Budget(100 * MS)}


def arrivals(
    phases_ms: tuple[float, ...], period_ms: float, travel_ms: float, jitter_ms: float, seed: int
) -> list[tuple[int, str, int]]:
    """(arrival, stream, stamp) of a second and a half, in the order of arrival."""
    random = np.random.default_rng(seed)
    found = []
    for name, phase in zip((*CAMERAS, "joints"), (*phases_ms, 0.3), strict=True):
        step = 2.0 if name == "joints" else period_ms
        times = 1000.0 + phase + np.arange(0.0, 1500.0, step)
        times += random.normal(0.0, jitter_ms, len(times)) if name != "joints" else 0.0
        found += [(round((t + travel_ms) * MS), name, round(t * MS)) for t in np.sort(times)]
    return sorted(found)


def play(
    incoming: list[tuple[int, str, int]], due_ns: int, tick_ms: float = 2.0
) -> tuple[dict[str, set[int]], dict[str, int]]:
    """Stamps forecast until the observation is made, and those it shows, by camera."""
    timeline: Timeline[int] = Timeline(BUDGETS, 50 * MS)
    said: dict[str, set[int]] = {name: set() for name in CAMERAS}
    position = 0
    for now in range(due_ns - 100 * MS, due_ns + 500 * MS, round(tick_ms * MS)):
        while position < len(incoming) and incoming[position][0] <= now:
            _, name, stamp = incoming[position]
            timeline.push(name, stamp, position, now_ns=now)
            position += 1
        outcome = timeline.latest(now)
        if isinstance(outcome, Observation) and outcome.t_ns >= due_ns:
            shown = {name: outcome.samples[name].stamp_ns for name in CAMERAS}
            return said, shown
        for name, sample in next_pictures(timeline.buffers, CAMERAS, due_ns).items():
            said[name].add(sample.stamp_ns)
    raise AssertionError("no observation")


@given(
    st.tuples(*[st.floats(0.0, 33.0)] * 3),
    st.floats(1300.0, 1900.0),
    st.floats(0.0, 10.0),
    st.integers(0, 99),
)
def test_regular_streams_are_foreseen_and_little_is_encoded_for_nothing(
    phases: tuple[float, ...], due_ms: float, travel_ms: float, seed: int
) -> None:
    said, shown = play(arrivals(phases, 33.3, travel_ms, 0.2, seed), round(due_ms * MS))
    apart = min(abs((a - b + 16.65) % 33.3 - 16.65) for a, b in combinations(phases, 2))
    for name in CAMERAS:
        assert len(said[name]) <= 2, "once, and once more where two cameras are nearly together"
        assert apart < 9.0 or shown[name] in said[name]


def test_cameras_a_third_of_a_period_apart_are_all_encoded_before_the_observation() -> None:
    right = 0
    for due in range(1300, 1600, 7):
        said, shown = play(arrivals((0.0, 11.1, 22.2), 33.3, 4.0, 0.3, due), due * MS)
        right += all(said[name] == {shown[name]} for name in CAMERAS)
    assert right >= 0.9 * len(range(1300, 1600, 7))


def test_cameras_that_expose_together_are_encoded_as_they_come_in() -> None:
    for due in range(1300, 1600, 7):
        incoming = arrivals((5.0, 5.0, 5.0), 33.3, 4.0, 0.0, 0)
        # Each picture takes its time on the way: the third arrives 10 ms after the first.
        late = {name: i * 5 * MS for i, name in enumerate(CAMERAS)} | {"joints": 0}
        said, shown = play(sorted((a + late[n], n, s) for a, n, s in incoming), due * MS)
        assert said == {"left": {shown["left"]}, "middle": {shown["middle"]}, "right": set()}


def test_nothing_is_named_long_before_the_time_or_without_a_rhythm() -> None:
    timeline: Timeline[int] = Timeline(BUDGETS, 50 * MS)
    for name in BUDGETS:
        timeline.push(name, 1000 * MS, 0)
    assert next_pictures(timeline.buffers, CAMERAS, 1010 * MS) == {}, "no rhythm yet"
    for name in BUDGETS:
        timeline.push(name, 1033 * MS, 1)
    assert next_pictures(timeline.buffers, CAMERAS, 1500 * MS) == {}
    assert next_pictures(timeline.buffers, CAMERAS, 1065 * MS) == {}, "all have a newer one to come by then"


def test_a_period_is_that_of_the_newest_stamps() -> None:
    buffer: StreamBuffer[int] = StreamBuffer("camera", 10_000 * MS)
    assert period_ns(buffer) is None
    for stamp in (1000, 1100, *range(1110, 1300, 10)):
        buffer.push(stamp * MS, 0)
    assert period_ns(buffer) == 10 * MS
