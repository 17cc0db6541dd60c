"""A plan is looked up by time: nothing is skipped, repeated or torn, however late or doubled chunks come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.control.plan import BlendSettings, Plan, monotone_slopes, plan_from_chunk
from kuavo_smolvla_ros.robot.limits import Limits

S = 1_000_000_000
MS = 1_000_000
START = 1_760_000_000 * S
LIMITS = Limits(
    ("arm", "grip", "switch"),
    np.array([-3, 0, 0.0]),
    np.array([3, 1, 1.0]),
    np.array([2.5, 4.0, np.inf]),
    np.array([10.0, 40.0, np.inf]),
)
BLEND = BlendSettings()


def chunk(values: np.ndarray, stamp_ns: int = START, fps: float = 10.0, **changes: Any) -> ActionChunk:
    times = np.arange(len(values), dtype=np.int64) * round(S / fps)
    fields: dict[str, Any] = {
        "task": "a",
        "sequence": 1,
        "fingerprint": "f",
        "names": LIMITS.names,
        **changes,
    }
    return ActionChunk(stamp_ns=stamp_ns, times_ns=times, values=values, **fields)


def wave(stamp_ns: int, steps: int = 30, amplitude: float = 0.5, phase: float = 0.0) -> np.ndarray:
    """One motion as a function of absolute time, as an ideal policy would predict it from any observation."""
    t = (stamp_ns - START) / S + np.arange(steps) / 10.0 + phase
    return np.stack([amplitude * np.sin(2 * t), 0.5 + 0.4 * np.sin(t), (np.sin(t) > 0).astype(float)], axis=1)


def sampled(plan: Plan, start_ns: int, end_ns: int, step_ns: int = 10 * MS) -> tuple[np.ndarray, np.ndarray]:
    times = np.arange(start_ns, end_ns + 1, step_ns, dtype=np.int64)
    return times, plan.sample(times)[0]


def test_goes_exactly_through_every_step_at_its_time() -> None:
    values = wave(START)
    plan = plan_from_chunk(chunk(values), LIMITS)
    for i, row in enumerate(values):
        np.testing.assert_allclose(plan.at(START + i * 100 * MS)[0], row, atol=1e-15)


def test_between_two_steps_it_never_leaves_their_range() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (50, 3))
    plan = plan_from_chunk(chunk(values), LIMITS)
    _, fine = sampled(plan, START, plan.valid_until_ns, 5 * MS)
    for i in range(49):
        part, ends = fine[20 * i : 20 * i + 21], values[i : i + 2]
        assert np.all(part >= ends.min(0) - 1e-12)
        assert np.all(part <= ends.max(0) + 1e-12)


def test_interior_slopes_agree_with_an_independent_implementation() -> None:
    interpolate = pytest.importorskip("scipy.interpolate")
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.05, 0.3, 20))
    values = rng.normal(size=(20, 4))
    expected = interpolate.PchipInterpolator(times, values).derivative()(times)
    np.testing.assert_allclose(monotone_slopes(times, values)[1:-1], expected[1:-1], atol=1e-12)


def test_velocity_is_the_derivative_of_position() -> None:
    plan = plan_from_chunk(chunk(wave(START)), LIMITS)
    for t in START + np.arange(3, 2800, 37) * MS:
        numeric = (plan.at(int(t) + 10_000)[0] - plan.at(int(t) - 10_000)[0]) / 2e-5
        np.testing.assert_allclose(plan.at(int(t))[1][:2], numeric[:2], atol=1e-4)


def test_velocity_has_no_step_at_a_knot() -> None:
    plan = plan_from_chunk(chunk(wave(START)), LIMITS)
    for i in range(1, 29):
        before, after = plan.at(START + i * 100 * MS - 1)[1], plan.at(START + i * 100 * MS)[1]
        np.testing.assert_allclose(before, after, atol=1e-4)


def test_a_switch_jumps_at_its_step_and_is_never_between() -> None:
    values = wave(START, steps=60)
    plan = plan_from_chunk(chunk(values), LIMITS)
    times, fine = sampled(plan, START, plan.valid_until_ns)
    assert set(np.unique(fine[:, 2])) == {0.0, 1.0}
    step = ((times - START) // (100 * MS)).astype(int)
    assert np.array_equal(fine[:, 2], values[step, 2])


def test_before_and_after_there_is_only_the_nearest_step_at_rest() -> None:
    values = wave(START)
    plan = plan_from_chunk(chunk(values), LIMITS)
    for t, row in ((START - 5 * S, values[0]), (START + 60 * S, values[-1])):
        position, velocity = plan.at(t)
        assert np.array_equal(position, row)
        assert not velocity.any()
    assert plan.valid_until_ns == START + 2900 * MS


def test_what_lies_before_a_splice_is_not_changed() -> None:
    old = plan_from_chunk(chunk(wave(START)), LIMITS)
    now = START + 777 * MS
    new = old.splice(chunk(wave(now, phase=0.4), now, sequence=2), now, LIMITS, BLEND)
    _, before = sampled(old, START, now, 7 * MS)
    _, after = sampled(new, START, now, 7 * MS)
    np.testing.assert_allclose(after, before, atol=1e-12)
    np.testing.assert_allclose(new.at(now)[0][:2], old.at(now)[0][:2], atol=1e-12)
    np.testing.assert_allclose(new.at(now)[1][:2], old.at(now)[1][:2], atol=1e-9)


def test_after_the_blend_the_new_chunk_holds_exactly() -> None:
    old = plan_from_chunk(chunk(wave(START)), LIMITS)
    now = START + 777 * MS
    raw = chunk(wave(now, phase=0.4), now, sequence=2, task="b")
    new = old.splice(raw, now, LIMITS, BLEND)
    later = now + round(BLEND.longest_s * S)
    _, expected = sampled(plan_from_chunk(raw, LIMITS), later + 100 * MS, new.valid_until_ns)
    _, got = sampled(new, later + 100 * MS, new.valid_until_ns)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert (new.task, new.sequence, new.valid_until_ns) == ("b", 2, raw.end_ns)


def test_joining_a_chunk_that_agrees_changes_nothing() -> None:
    """An ideal policy: every chunk is the same motion, so blends and latency must be invisible."""
    values = wave(START, steps=60)
    plan = plan_from_chunk(chunk(values), LIMITS)
    reference = plan
    for k in range(1, 20):
        now = START + k * 200 * MS
        stamp = now - 100 * MS
        plan = plan.splice(chunk(wave(stamp, steps=20), stamp, sequence=k), now, LIMITS, BLEND)
        _, got = sampled(plan, now, now + 200 * MS)
        _, expected = sampled(reference, now, now + 200 * MS)
        np.testing.assert_allclose(got[:, :2], expected[:, :2], atol=2e-3)


def test_the_same_chunk_twice_is_the_same_as_once() -> None:
    old = plan_from_chunk(chunk(wave(START)), LIMITS)
    now = START + 500 * MS
    raw = chunk(wave(now), now, sequence=2)
    once = old.splice(raw, now, LIMITS, BLEND)
    later = now + 600 * MS
    twice = once.splice(raw, later, LIMITS, BLEND)
    _, a = sampled(once, now, once.valid_until_ns)
    _, b = sampled(twice, now, twice.valid_until_ns)
    np.testing.assert_allclose(a[:, :2], b[:, :2], atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_seams_under_random_latency_and_noise_stay_within_a_bound(data: st.DataObject) -> None:
    """The velocity a seam adds is at most 1.5 d/T for a difference d, whatever the latencies were."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    noise = data.draw(st.floats(0, 0.3))
    plan = plan_from_chunk(chunk(wave(START) + noise * rng.normal(size=(30, 3))), LIMITS)
    now = START
    for k in range(1, 8):
        now += data.draw(st.integers(1, 900)) * MS
        stamp = now - data.draw(st.integers(0, 900)) * MS
        raw = chunk(wave(stamp) + noise * rng.normal(size=(30, 3)), stamp, sequence=k)
        fresh = plan_from_chunk(raw, LIMITS)
        times = np.arange(now, now + 700 * MS, 5 * MS, dtype=np.int64)
        joined = plan.splice(raw, now, LIMITS, BLEND)
        (p, v), (q, w) = plan.sample(times), fresh.sample(times)
        speed = np.maximum(np.abs(v), np.abs(w)).max(0)[0]
        gap = np.abs(p - q).max(0)[0]
        steps = np.abs(np.diff(joined.sample(times)[0][:, 0])) / 0.005
        assert steps.max() <= speed + 1.5 * gap / BLEND.shortest_s + 1e-2
        assert abs(joined.at(now)[0][0] - plan.at(now)[0][0]) < 1e-12
        plan = joined


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 800)), min_size=1, max_size=15))
def test_time_decides_so_no_step_is_skipped_or_repeated(arrivals: list[tuple[int, int]]) -> None:
    """A ramp of one unit per second arrives in pieces with any latency; what is executed is the ramp."""

    def ramp(stamp_ns: int) -> np.ndarray:
        t = (stamp_ns - START) / S + np.arange(20) / 10.0
        return np.stack([0.1 * t, np.full(20, 0.5), np.zeros(20)], axis=1)

    plan = plan_from_chunk(chunk(ramp(START)), LIMITS)
    now = START
    for k, (wait_ms, latency_ms) in enumerate(arrivals):
        _, part = sampled(plan, now, now + wait_ms * MS, MS)
        expected = 0.1 * (np.arange(len(part)) * 1e-3 + (now - START) / S)
        np.testing.assert_allclose(part[:, 0], expected, atol=1e-6)
        now += wait_ms * MS
        stamp = max(START, now - latency_ms * MS)
        plan = plan.splice(chunk(ramp(stamp), stamp, sequence=k + 2), now, LIMITS, BLEND)


def test_a_large_difference_blends_longer_than_a_small_one() -> None:
    old = plan_from_chunk(chunk(np.zeros((30, 3))), LIMITS)

    def blended_s(offset: float) -> float:
        new = old.splice(chunk(np.tile([offset, 0, 0], (30, 1)), sequence=2), START + S, LIMITS, BLEND)
        times, path = sampled(new, START + S, START + 2 * S)
        return float((times[np.argmax(path[:, 0] >= offset - 1e-9)] - START - S) / S)

    assert blended_s(0.001) == pytest.approx(0.1, abs=0.02)
    assert 0.1 < blended_s(0.1) < blended_s(0.3) <= 0.5


@pytest.mark.parametrize("offset", [0.05, 0.2, -0.3])
def test_inside_a_blend_motion_is_smooth_and_within_the_bounds_of_its_length(offset: float) -> None:
    """From rest to rest over T: velocity at most 1.5 d/T, acceleration at most 6 d/T^2."""
    old = plan_from_chunk(chunk(np.zeros((30, 3))), LIMITS)
    now = START + S
    new = old.splice(chunk(np.tile([offset, 0, 0], (30, 1)), sequence=2), now, LIMITS, BLEND)
    times = np.arange(now, now + 700 * MS, MS, dtype=np.int64)
    path, speed = (column[:, 0] for column in new.sample(times))
    arrived = np.argmax(np.abs(path - offset) < 1e-9)
    blend_s = float(times[arrived] - now) / S
    numeric = np.gradient(path, 1e-3)
    np.testing.assert_allclose(speed[1:-1], numeric[1:-1], atol=abs(offset) / blend_s * 0.02)
    assert np.abs(numeric).max() <= 1.5 * abs(offset) / blend_s * 1.02
    assert np.abs(np.diff(speed)).max() / 1e-3 <= 6 * abs(offset) / blend_s**2 * 1.05


def test_a_chunk_that_is_nearly_over_is_joined_up_to_its_end() -> None:
    old = plan_from_chunk(chunk(wave(START)), LIMITS)
    now = START + S
    raw = chunk(wave(START, steps=11) + 0.2, now - S + 30 * MS, sequence=2)
    new = old.splice(raw, now, LIMITS, BLEND)
    assert new.valid_until_ns == raw.end_ns
    np.testing.assert_allclose(new.at(raw.end_ns)[0], raw.values[-1], atol=1e-12)
    assert np.all(np.diff(new.times_ns) > 0)


def test_history_does_not_grow_without_end() -> None:
    plan = plan_from_chunk(chunk(wave(START)), LIMITS)
    for k in range(300):
        now = START + k * 10 * MS
        plan = plan.splice(chunk(wave(now), now, sequence=k), now, LIMITS, BLEND)
    assert len(plan.times_ns) < 400
    assert np.all(np.diff(plan.times_ns) > 0)
