"""The thinking thread with a real (tiny) policy: pictures encoded ahead give the same chunk, or none."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, JointState

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.nodes.ahead import time_to_encode_s
from kuavo_smolvla_ros.nodes.inference import AHEAD_PER_THOUGHT, Habits, Question, Thinker, Thought
from kuavo_smolvla_ros.nodes.instruction import Instruction
from kuavo_smolvla_ros.nodes.observer import Observer
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import build, stamp_fields
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.timeline import Observation, Sample
from kuavo_smolvla_ros.robot.vectors import encode_state

SPEC = load_spec("kuavo_sim")
T_NS = 5_000_000_000


def picture(seed: int, stamp_ns: int = T_NS) -> Sample[bytes]:
    """A camera's message."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    data = encode_jpeg(coarse.repeat(16, 0).repeat(16, 1), 90)
    fields = {"format": "jpeg", "data": data, **stamp_fields(stamp_ns)}
    return Sample(stamp_ns, serialize_message(build(CompressedImage, fields)))


def observation(seed: int, t_ns: int = T_NS) -> Observation[bytes]:
    samples = {camera.stream: picture(seed + i, t_ns) for i, camera in enumerate(SPEC.cameras.values())}
    pose = np.full(len(SPEC.state_names), 0.3)
    for name, fields in encode_state(SPEC, pose).items():
        message = build(JointState, {**fields, **stamp_fields(t_ns)})
        samples[name] = Sample(t_ns, serialize_message(message))
    return Observation(t_ns, samples, 0)


def frames(seen: Observation[bytes]) -> dict[str, Sample[bytes]]:
    return {role: seen.samples[camera.stream] for role, camera in SPEC.cameras.items()}


@pytest.fixture(scope="module")
def runner(checkpoint: Any) -> Any:
    from kuavo_smolvla_ros.policy.runtime import PolicyRunner

    return PolicyRunner.load(checkpoint)


class Desk:
    """A thinker, and the thoughts it has had."""

    def __init__(self, runner: Any) -> None:
        types = {name: CompressedImage if "image" in name else JointState for name in SPEC.inputs}
        ears: Any = SimpleNamespace(types=types)
        habits = Habits(
            names=SPEC.action_names,
            fingerprint=SPEC.fingerprint,
            fps=SPEC.fps,
            n_action_steps=8,
            realtime=True,
            execution_horizon=10,
            now_ns=lambda: T_NS,
            time_factor=lambda: 1.0,
            seed=0,
            spec=SPEC,
        )
        self.thoughts: queue.SimpleQueue[Thought] = queue.SimpleQueue()
        self.thinker = Thinker(runner, Observer(SPEC, ears, None), habits, self.thoughts.put)

    def think(self, seen: Observation[bytes], previous: ActionChunk | None = None) -> Thought:
        while self.thinker.busy:  # it is so for a moment after its last thought was heard
            threading.Event().wait(0.001)
        self.thinker.ask(Question(seen, Instruction("pick it up", "task"), 0, previous))
        return self.thoughts.get(timeout=60)

    def prepared(self, count: int) -> None:
        """Wait until this many pictures have been encoded."""
        for _ in range(60_000):
            if self.thinker.encoded_ahead >= count or self.thinker.ahead_fault is not None:
                return
            threading.Event().wait(0.001)
        raise AssertionError(f"{self.thinker.encoded_ahead} pictures encoded, not {count}")


@pytest.fixture
def make_desk(runner: Any) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(other: Any = None) -> Desk:
        desks.append(Desk(runner if other is None else other))
        return desks[-1]

    yield make
    for desk in desks:
        assert desk.thinker.close()


def values(thought: Thought) -> np.ndarray:
    assert thought.chunk is not None, thought.error
    return thought.chunk.values


def test_pictures_encoded_ahead_give_the_same_chunk(make_desk: Callable[..., Desk], runner: Any) -> None:
    seen, desk = observation(1), make_desk()
    expected = values(desk.think(seen))
    for names in (["head_cam_h"], ["head_cam_h", "wrist_cam_r"], list(SPEC.cameras)):
        ahead = make_desk()
        ahead.thinker.prepare({role: frames(seen)[role] for role in names})
        ahead.prepared(len(names))
        before = runner._cameras.encoded
        assert np.abs(values(ahead.think(seen)) - expected).max() < 1e-5
        assert runner._cameras.encoded - before == len(SPEC.cameras) - len(names)
        assert ahead.thinker.used_ahead == len(names)


def test_a_plan_the_arms_do_not_follow_is_not_continued(make_desk: Callable[..., Desk]) -> None:
    """They stand at 0.3 rad; a chunk that continued one at 1.5 rad would be refused, as that one was."""

    def plan(at: float) -> ActionChunk:
        rows = np.full((50, len(SPEC.action_names)), at)
        times_ns = np.arange(50) * 100_000_000
        return ActionChunk(T_NS, times_ns, SPEC.action_names, rows, "task", 1, SPEC.fingerprint)

    seen = observation(1)
    anew = values(make_desk().think(seen))
    refused = values(make_desk().think(seen, plan(1.5)))
    under_way = values(make_desk().think(seen, plan(0.5)))
    assert np.abs(refused - anew).max() < 1e-6
    assert np.abs(under_way - anew).max() > 0.01


def test_another_picture_with_the_same_stamp_is_not_taken_for_it(make_desk: Callable[..., Desk]) -> None:
    """As after a clock was set back, and between two activations of one policy."""
    desk, old, new = make_desk(), observation(1), observation(7)
    desk.thinker.prepare(frames(old))
    desk.prepared(3)
    expected = values(make_desk().think(new))
    assert np.abs(values(desk.think(new)) - expected).max() < 1e-5
    assert desk.thinker.used_ahead == 0
    later = make_desk()
    later.thinker.prepare(frames(new))
    later.prepared(3)
    assert np.abs(values(later.think(new)) - expected).max() < 1e-5
    assert later.thinker.used_ahead == 3


def test_each_picture_is_encoded_once_and_few_of_them_for_one_thought(
    make_desk: Callable[..., Desk],
) -> None:
    desk = make_desk()
    for seed in range(10):
        for _ in range(3):
            desk.thinker.prepare({"head_cam_h": picture(seed)} if seed else frames(observation(0)))
    desk.prepared(3)
    seen = observation(50)
    values(desk.think(seen))
    assert desk.thinker.encoded_ahead <= 2 + AHEAD_PER_THOUGHT
    before = desk.thinker.encoded_ahead
    desk.thinker.prepare(frames(observation(60)))
    desk.prepared(before + 3)


def test_a_broken_picture_is_reported_by_the_thought_that_needs_it(make_desk: Callable[..., Desk]) -> None:
    seen, desk = observation(3), make_desk()
    stream = SPEC.cameras["wrist_cam_l"].stream
    broken = Sample(T_NS, seen.samples[stream].item[:400])
    seen.samples[stream] = broken  # type: ignore[index]
    desk.thinker.prepare(frames(seen))
    desk.prepared(2)
    thought = desk.think(seen)
    assert thought.chunk is None
    assert "left_image" in str(thought.error) or "wrist_cam_l" in str(thought.error)
    assert desk.thinker.ahead_fault is None


def test_a_policy_on_the_plain_path_and_a_failing_encoder_end_it_with_a_reason(
    make_desk: Callable[..., Desk], runner: Any, checkpoint: Any
) -> None:
    from kuavo_smolvla_ros.policy.runtime import PolicyRunner

    class Failing:
        chunk = runner.chunk

        def encode_camera(self, *_: Any) -> bool:
            raise RuntimeError("out of memory")

    plain = PolicyRunner.load(checkpoint, fast=False)
    assert time_to_encode_s(plain, SPEC) is None
    for other, says in ((plain, "plain path"), (Failing(), "out of memory")):
        desk, seen = make_desk(other), observation(4)
        desk.thinker.prepare(frames(seen))
        desk.prepared(1)
        assert says in str(desk.thinker.ahead_fault)
        assert values(desk.think(seen)).shape == (50, 16)


def test_the_time_for_a_picture_is_measured_with_all_that_is_built_at_first_use(runner: Any) -> None:
    took = time_to_encode_s(runner, SPEC)
    assert took is not None
    assert took > 0
