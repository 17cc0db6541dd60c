"""Whatever is asked for, and however unevenly time passes: no command outside any limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.guard import Guard
from kuavo_smolvla_ros.robot.limits import Limits
from kuavo_smolvla_ros.robot.spec import load_spec

FloatArray = NDArray[np.float64]
TOLERANCE = 1e-6
EXTREMES = np.array([0.0, -0.0, 5e-324, -1e-300, 1e-9, 1e300, -1.7e308, 1.7e308, np.inf, -np.inf, np.nan])


class Run:
    """A batch of guards, judged by finite differences of their commands alone."""

    def __init__(self, limits: Limits, start: FloatArray, **options: object) -> None:
        self.guard = Guard(limits, **options)  # type: ignore[arg-type]
        self.guard.start(start)
        self.limits = limits
        self.position, self.velocity = start, np.zeros_like(start)

    def step(self, target: FloatArray, dt: float, velocity: FloatArray | None, speed: float) -> None:
        self.judge(self.guard.step(target, dt, velocity=velocity, speed=speed), dt)

    def brake(self, dt: float) -> None:
        self.judge(self.guard.brake(dt), dt)

    def judge(self, command: FloatArray, dt: float) -> None:
        limits = self.limits
        velocity = (command - self.position) / dt
        assert np.isfinite(command).all()
        assert np.all(command >= np.minimum(limits.lower, self.position))
        assert np.all(command <= np.maximum(limits.upper, self.position))
        assert np.all(np.abs(velocity) <= limits.velocity * (1 + TOLERANCE))
        change = np.abs(velocity - self.velocity)
        # rounding of a position of 1 rad, seen through a division by dt
        slack = 4 * np.finfo(float).eps * np.maximum(1.0, np.abs(command)) / dt
        assert np.all(change <= limits.acceleration * dt * (1 + TOLERANCE) + slack)
        self.position, self.velocity = command, velocity


def hostile_target(rng: np.random.Generator, limits: Limits, position: FloatArray, kind: int) -> FloatArray:
    shape = position.shape
    wild = rng.uniform(limits.lower - 3, limits.upper + 3, shape)
    if kind == 0:
        return wild
    if kind == 1:  # from one stop to the other
        return np.where(rng.random(shape) < 0.5, limits.lower, limits.upper)
    if kind == 2:  # values no robot was ever told
        return np.where(rng.random(shape) < 0.02, rng.choice(EXTREMES, shape), wild)
    if kind == 3:  # chatter around the present command
        return position + rng.normal(0, 0.05, shape)
    return np.nextafter(
        np.where(rng.random(shape) < 0.5, limits.lower, limits.upper), rng.choice([-9, 9], shape)
    )


@pytest.mark.parametrize("keep_direction", [False, True])
@pytest.mark.parametrize("robot", ["kuavo_sim", "kuavo_mobile"])
def test_ten_thousand_hostile_sequences_stay_within_every_limit(robot: str, keep_direction: bool) -> None:
    spec = load_spec(robot)
    limits = spec.limits(spec.action_names)
    groups = [spec.joints[name].group for name in limits.names]
    rng = np.random.default_rng(7)
    batch = 2500
    start = rng.uniform(limits.lower, limits.upper, (batch, len(limits)))
    start[:50], start[50:100] = limits.lower, limits.upper
    run = Run(limits, start, groups=groups, keep_direction=keep_direction)
    kind = rng.integers(5)
    for step in range(120):
        if step % 12 == 0:
            kind = rng.integers(5)
        dt = float(rng.choice([0.01, 0.01, 0.001, 0.02, 0.05, rng.uniform(0.001, 0.05)]))
        target = hostile_target(rng, limits, run.position, int(kind))
        velocity = None
        if rng.random() < 0.6:
            velocity = rng.normal(0, 3, start.shape)
            velocity = np.where(rng.random(start.shape) < 0.005, rng.choice(EXTREMES, start.shape), velocity)
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            if rng.random() < 0.05:
                run.brake(dt)
            else:
                run.step(target, dt, velocity, float(rng.choice([1.0, 1.0, 0.25])))


@st.composite
def random_limits(draw: st.DrawFn) -> Limits:
    n = draw(st.integers(1, 4))
    floats = st.floats(0.01, 100.0)
    bounds = st.one_of(floats, st.just(np.inf))
    lower = np.array([draw(st.floats(-10, 10)) for _ in range(n)])
    width = np.array([draw(st.floats(1e-3, 20)) for _ in range(n)])
    return Limits(
        names=tuple(f"j{i}" for i in range(n)),
        lower=lower,
        upper=lower + width,
        velocity=np.array([draw(bounds) for _ in range(n)]),
        acceleration=np.array([draw(bounds) for _ in range(n)]),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), limits=random_limits(), keep_direction=st.booleans())
def test_any_limits_any_targets_any_times(data: st.DataObject, limits: Limits, keep_direction: bool) -> None:
    share = np.array([data.draw(st.floats(0, 1)) for _ in limits.names])
    start = limits.lower + share * (limits.upper - limits.lower)
    start = np.clip(start, limits.lower, limits.upper)
    run = Run(limits, start, groups=["all"] * len(limits), keep_direction=keep_direction)
    number = st.floats(allow_nan=True, allow_infinity=True)
    for _ in range(data.draw(st.integers(1, 12))):
        dt = data.draw(st.floats(1e-3, 0.05))
        target = np.array([data.draw(number) for _ in limits.names])
        velocity = np.array([data.draw(number) for _ in limits.names]) if data.draw(st.booleans()) else None
        for _ in range(data.draw(st.integers(1, 8))):
            run.step(target, dt, velocity, data.draw(st.sampled_from([1.0, 0.25])))
    for _ in range(3):
        run.brake(0.01)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_from_anywhere_braking_ends_within_v_over_a(data: st.DataObject, small_limits: Limits) -> None:
    run = Run(small_limits, np.clip(np.zeros(4), small_limits.lower, small_limits.upper), groups=["g"] * 4)
    for _ in range(data.draw(st.integers(1, 60))):
        wish = data.draw(st.sampled_from([-5.0, -0.3, 0.4, 5.0]))
        run.step(np.full(4, wish), 0.01, None, 1.0)
    bound_s = float(
        np.max(
            np.where(np.isfinite(small_limits.velocity), small_limits.velocity, 0.0)
            / np.where(np.isfinite(small_limits.acceleration), small_limits.acceleration, 1.0)
        )
    )
    for _ in range(int(np.ceil(bound_s / 0.01)) + 1):
        run.brake(0.01)
    assert run.guard.at_rest


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0])
def test_the_same_limits_hold_at_any_speed_of_a_simulated_clock(small_limits: Limits, factor: float) -> None:
    """At a real-time factor r a wall-clock timer of 10 ms sees steps of r * 10 ms of robot time."""
    dt = 0.01 * factor
    run = Run(small_limits, np.zeros(4))
    for step in range(round(3.0 / dt)):
        wave = 2.0 * np.sin(2.0 * step * dt)
        run.step(np.full(4, wave), dt, None, 1.0)
    reference = Run(small_limits, np.zeros(4))
    for _ in range(round(2.0 / dt)):
        reference.step(np.array([0.5, 0.1, 0.5, 1.0]), dt, None, 1.0)
    np.testing.assert_allclose(reference.position, [0.5, 0.1, 0.5, 1.0], atol=1e-6)
