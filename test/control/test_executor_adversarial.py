"""Ten thousand random and hostile chunks, uneven time, faults and requests: no command outside any limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.control.reasons import Request, State, StopReason, Transition

S = 1_000_000_000
MS = 1_000_000
NUMBERS = np.array([np.nan, np.inf, -np.inf, 1e308, -1e308, 5e-324, 57.3, 0.0])


def plausible(world: Any, rng: np.random.Generator) -> ActionChunk:
    """What a policy might send: from near the pose to anywhere, smooth or noisy, early or late."""
    at = world.settings.index(world.settings.chunk_names)
    limits = world.settings.limits
    steps = int(rng.integers(2, 60))
    start = world.pose[at] + rng.normal(0, rng.choice([0.01, 0.1, 0.3]), len(at))
    goal = rng.uniform(limits.lower[at] - 0.3, limits.upper[at] + 0.3)
    share = np.clip(np.arange(steps) / rng.integers(1, 40), 0, 1)[:, None]
    values = start + share * (goal - start) + rng.normal(0, rng.choice([0.0, 0.02, 0.2]), (steps, len(at)))
    return world.chunk(
        values=values,
        steps=steps,
        fps=float(rng.choice([5, 10, 30, 100])),
        age_s=float(rng.choice([0.0, 0.05, 0.3, 1.0, -0.04])),
        task=str(rng.choice(["task1", "task1", "task1", "task2"])),
    )


def hostile(world: Any, rng: np.random.Generator) -> ActionChunk:
    """A plausible chunk with one thing wrong."""
    good = plausible(world, rng)
    kind = rng.integers(10)
    values, times = good.values.copy(), good.times_ns.copy()
    if kind == 0:
        values[rng.integers(len(values)), rng.integers(values.shape[1])] = rng.choice(NUMBERS)
        return replace(good, values=values)
    if kind == 1:
        return replace(good, values=values[:, : rng.integers(values.shape[1])])
    if kind == 2:
        return replace(good, values=values[: rng.integers(len(values))])
    if kind == 3:
        return replace(good, names=tuple(rng.permutation(good.names)))
    if kind == 4:
        return replace(good, fingerprint="another robot")
    if kind == 5:
        return replace(good, stamp_ns=good.stamp_ns + int(rng.integers(-100, 100)) * S)
    if kind == 6:
        return replace(good, times_ns=rng.permutation(times))
    if kind == 7:
        return replace(good, times_ns=times + int(rng.integers(-5, 5)) * S)
    if kind == 8:
        return replace(good, sequence=good.sequence - 1, stamp_ns=good.stamp_ns - 1)
    return replace(good, values=np.full_like(values, rng.choice(NUMBERS)))


@pytest.mark.parametrize("keep_direction", [False, True])
@pytest.mark.parametrize("transition", [Transition.BLEND, Transition.STOP_THEN_SWITCH])
def test_ten_thousand_chunks(
    make_world: Callable[..., Any], transition: Transition, keep_direction: bool
) -> None:
    world = make_world(
        transition=transition, keep_direction=keep_direction, starvation_latches=not keep_direction
    )
    rng = np.random.default_rng(11)
    accepted, states, longest = 0, Counter[State](), 0.0
    world.step()
    for _ in range(2500):
        chunk = plausible(world, rng) if rng.random() < 0.6 else hostile(world, rng)
        decision = world.tick(chunk, dt_s=float(rng.choice([0.01, 0.01, 0.008, 0.013, 0.03])))
        accepted += len(decision.accepted)
        for _ in range(int(rng.integers(0, 3))):
            before = world.last.command
            world.tick(dt_s=float(rng.choice([0.01, 0.0, 0.0004, 0.012, 0.06])))
            if before is not None and world.last.command is not None:
                longest = max(longest, float(np.abs(world.command - before)[:7].max()))
            states[world.last.state] += 1
        if world.last.state is State.HOLDING and rng.random() < 0.5:
            world.ask(Request.RESUME)
        if rng.random() < 0.01:
            world.ask(Request(rng.choice([Request.STOP.value, Request.PAUSE.value])))
        if rng.random() < 0.005:
            world.tick(foreign_publishers=("/other",))
    # The run is worth something only if chunks were used and motion was fast.
    assert accepted > 250
    assert states[State.FOLLOWING] > 100
    assert world.judge.worst_velocity > 0.5
    assert world.judge.worst_acceleration > 0.99
    assert longest <= 2.5 * 0.05 * (1 + 1e-9)


def test_noise_at_full_scale_with_every_chunk_accepted(make_world: Callable[..., Any]) -> None:
    """The bound on distance lifted, every chunk a jump to anywhere: the guard alone keeps the limits."""
    world = make_world(refuse_above=1e9, ramp_above=1e9, max_following_error=1e9)
    rng = np.random.default_rng(3)
    limits = world.settings.limits
    world.step()
    for _ in range(400):
        values = rng.uniform(limits.lower - 1, limits.upper + 1, (20, len(limits)))
        decision = world.tick(world.chunk(values=values, steps=20, fps=30.0))
        assert decision.accepted
        for _ in range(int(rng.integers(1, 8))):
            world.tick()
        assert world.last.state is State.FOLLOWING
    assert world.judge.worst_velocity == pytest.approx(1.0, abs=1e-6)
    assert world.judge.worst_acceleration == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_random_latency_leaves_no_step_at_a_seam(make_world: Callable[..., Any], seed: int) -> None:
    """A policy with noise and any latency: at seams the command moves no more than between them."""
    world = make_world()
    rng = np.random.default_rng(seed)
    world.step()
    base = world.pose.copy()
    begun = world.ros_ns
    amplitude = np.where(np.arange(16) % 8 == 7, 0.0, 0.15)

    def motion(stamp_ns: int) -> np.ndarray:
        t = (stamp_ns - begun) / S + np.arange(50) / 10.0
        return base + (1 - np.cos(t))[:, None] * amplitude + rng.normal(0, 0.01, 16) * (amplitude > 0)

    seams, between = [], []
    thinking: list[tuple[int, ActionChunk]] = []
    last: np.ndarray | None = None
    for k in range(600):
        arrived = [chunk for ready_ns, chunk in thinking if ready_ns <= world.ros_ns]
        thinking = [entry for entry in thinking if entry[0] > world.ros_ns]
        before = last
        decision = world.tick(*arrived)
        last = world.command
        if before is not None:
            (seams if decision.accepted else between).append(np.abs(last - before).max() / 0.01)
        if k % 10 == 0:
            chunk = world.chunk(values=motion(world.ros_ns), age_s=0.01)
            thinking.append((world.ros_ns + int(rng.integers(0, 900)) * MS, chunk))
        assert world.last.state in (State.IDLE, State.FOLLOWING)
    assert len(seams) > 20
    assert max(seams) <= max(between) * 1.05
    assert max(seams) < 1.0
    expected = motion(world.ros_ns)[0]
    assert np.abs(world.command - expected).max() < 0.08
    assert world.last.reason is None or world.last.reason is StopReason.STARVED
