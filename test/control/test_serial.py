"""What the flight recorder writes is enough to reach the same decisions again, from any moment on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.reasons import RefusalReason, Request, State, Transition
from kuavo_smolvla_ros.control.records import Inputs
from kuavo_smolvla_ros.control.serial import (
    capture,
    decision_to_plain,
    first_difference,
    inputs_from_plain,
    inputs_to_plain,
    restore,
    settings_from_plain,
    to_plain,
)


def through_json(plain: Any) -> Any:
    return json.loads(json.dumps(plain, allow_nan=False))


@pytest.fixture
def story(make_world: Callable[..., Any]) -> Callable[..., tuple[Any, list[Inputs], list[dict[str, Any]]]]:
    """A run with everything in it, and snapshots before every period."""

    def tell(robot: str, transition: Transition) -> tuple[Any, list[Inputs], list[dict[str, Any]]]:
        world = make_world(robot, transition=transition, starvation_latches=False)
        taken: list[Inputs] = []
        snapshots: list[dict[str, Any]] = []
        step = world.executor.step

        def recording(now: Inputs) -> Any:
            snapshots.append(to_plain(capture(world.executor)))
            taken.append(now)
            return step(now)

        world.executor.step = recording
        world.tick(joints=None)
        world.follow(0.2)
        world.run(0.3)
        world.tick(world.chunk(-0.1, task="task2", steps=8))
        bad = world.chunk(0.1)
        hostile = np.where(np.arange(len(bad.names)) == 3, np.nan, bad.values)
        world.tick(replace(bad, values=hostile), Refusal(RefusalReason.WRONG_SHAPE, "ragged", 1))
        world.tick(replace(bad, values=np.zeros((0, 3))), replace(bad, values=np.zeros(7)))
        world.run(0.9)
        world.tick(world.chunk(0.1))
        world.run(0.2)
        world.tick(foreign_publishers=("/a", "/b"))
        world.run(0.1)
        world.ask(Request.RESUME)
        world.tick(world.chunk(0.1, age_s=0.0))
        world.run(0.2)
        world.tick(unmet="not in stance")
        world.run(0.2)
        world.ask(Request.E_STOP)
        world.ask(Request.RELEASE_E_STOP, Request.RESUME)
        world.run(0.1)
        world.ros_ns -= 10**10
        world.tick()
        return world, taken, snapshots

    return tell


@pytest.mark.parametrize("robot", ["kuavo_sim", "kuavo_mobile"])
@pytest.mark.parametrize("transition", list(Transition))
def test_a_replay_from_any_moment_reaches_the_same_decisions(
    story: Any, robot: str, transition: Transition
) -> None:
    world, taken, snapshots = story(robot, transition)
    recorded = [through_json(decision_to_plain(d)) for d in world.decisions]
    plain = [through_json(inputs_to_plain(i)) for i in taken]
    assert {State(r["state"]) for r in recorded} >= {State.IDLE, State.FOLLOWING, State.HOLDING}
    for begin in (0, 1, 20, 33, 34, 60, 100, 130, 140, len(taken) - 40, len(taken) - 2):
        executor = restore(through_json(snapshots[begin]))
        for k in range(begin, len(taken)):
            replayed = through_json(decision_to_plain(executor.step(inputs_from_plain(plain[k]))))
            assert first_difference(recorded[k], replayed) is None, f"period {k} of a replay from {begin}"


def test_a_replay_with_one_other_input_is_found_out(story: Any) -> None:
    world, taken, _ = story("kuavo_sim", Transition.BLEND)
    executor = Executor(world.settings)
    found = None
    for k, inputs in enumerate(taken):
        given = replace(inputs, requests=(Request.STOP,)) if k == 20 else inputs
        found = first_difference(
            decision_to_plain(world.decisions[k]), decision_to_plain(executor.step(given))
        )
        if found is not None:
            break
    assert k == 20
    assert found is not None
    assert found.startswith("state: recorded following, replayed")


def test_settings_come_back_equal(make_world: Callable[..., Any]) -> None:
    settings = make_world("kuavo_mobile", policy_max_silence_s=np.inf).settings
    again = settings_from_plain(through_json(to_plain(settings)))
    assert to_plain(again) == to_plain(settings)
    assert np.isinf(again.limits.velocity[-1])
    assert np.isinf(again.policy_max_silence_s)
    assert again.transition is settings.transition


def test_a_hostile_chunk_comes_back_as_it_was(world: Any) -> None:
    good = world.chunk()
    for values in (
        np.full((2, 3), np.nan),
        np.array([np.inf, -np.inf, 1e308, 5e-324]),
        np.zeros((0, 16)),
        np.zeros((1, 2, 3)),
    ):
        inputs = Inputs(1, 2, chunks=(replace(good, values=values),))
        again = inputs_from_plain(through_json(inputs_to_plain(inputs))).chunks[0]
        assert isinstance(again, ActionChunk)
        np.testing.assert_array_equal(again.values, values)
        assert again.values.shape == values.shape
        assert (again.names, again.key, again.task) == (good.names, good.key, good.task)


def test_a_memory_taken_in_the_control_loop_does_not_change_afterwards(world: Any) -> None:
    world.follow(0.3)
    world.run(0.2)
    memory = capture(world.executor)
    at_once = through_json(to_plain(memory))
    world.tick(world.chunk(-0.2))
    world.run(0.5)
    world.ask(Request.E_STOP)
    world.run(0.5)
    assert through_json(to_plain(memory)) == at_once


def test_a_restored_executor_needs_every_part_of_a_snapshot(world: Any) -> None:
    world.follow(0.1)
    whole = through_json(to_plain(capture(world.executor)))
    for key in whole:
        with pytest.raises(KeyError, match=key):
            restore({k: v for k, v in whole.items() if k != key})
