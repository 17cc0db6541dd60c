"""Thinking in a thread of its own: one observation in, one chunk out, never two at a time.

Between two thoughts the thread may put pictures through the vision encoder that the next one will need
(`prepare`). A thought uses what was prepared only for the very messages of its observation, and finds the
thread at most one picture's encoding away.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kuavo_smolvla_ros.control.chunk import ActionChunk, uniform_times_ns
from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes.instruction import Instruction
from kuavo_smolvla_ros.nodes.observer import Decoded, Observer
from kuavo_smolvla_ros.nodes.turns import in_turns, to_continue
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.timeline import Observation, Sample

LATENCIES_KEPT = 100
AHEAD_PER_THOUGHT = 2  # pictures of one camera: a wrong forecast costs little, a stream gone wild no more

_numbers = itertools.count()  # of pictures encoded ahead; a policy outlives the thinkers that ask it


class Runner(Protocol):
    """The part of a policy that is asked here."""

    def chunk(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        instruction: str,
        *,
        prefix: np.ndarray | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        seed: int | None = None,
        stamps: Mapping[str, int] | None = None,
    ) -> np.ndarray: ...

    def encode_camera(self, role: str, image: np.ndarray, stamp: int) -> bool: ...


class Prepared(NamedTuple):
    """A picture that was encoded, with the message it came in and the number by which the runner knows it.

    Not its stamp: after a clock was set back another picture may bear the same one.
    """

    item: bytes
    picture: np.ndarray
    number: int


@dataclass(frozen=True)
class Question:
    """What to think about. `epoch` changes with all that makes an answer useless before it is given."""

    observation: Observation[bytes]
    instruction: Instruction
    epoch: int
    previous: ActionChunk | None


@dataclass(frozen=True)
class Thought:
    """What came of it: a chunk, or what went wrong. Latencies are in wall-clock seconds."""

    question: Question
    chunk: ActionChunk | None
    seen: Decoded | None
    error: Exception | None


@dataclass(frozen=True)
class Habits:
    """How chunks are made from the policy's answers."""

    names: tuple[str, ...]
    fingerprint: str
    fps: float
    n_action_steps: int
    realtime: bool
    execution_horizon: int
    now_ns: Callable[[], int]
    """The robot's clock."""
    time_factor: Callable[[], float]
    """Seconds of the robot's clock per second of the wall: what turns a latency into steps."""
    seed: int | None
    spec: RobotSpec
    first_latency_s: float = 0.0
    """What an answer took while warming up: what the first one is expected to take."""


class Thinker:
    """Owns the thread; `on_thought` is called in it."""

    def __init__(
        self, runner: Runner, observer: Observer, habits: Habits, on_thought: Callable[[Thought], None]
    ) -> None:
        self._runner = runner
        self._observer = observer
        self._habits = habits
        self._on_thought = on_thought
        self._question: Question | None = None
        self._wake = threading.Condition()
        self._ending = False
        self._sequence = 0
        self._frames: dict[str, Sample[bytes]] = {}
        self._offered: dict[str, bytes] = {}
        self._offers: Counter[str] = Counter()
        self._prepared: dict[str, Prepared] = {}
        self.encoded_ahead = 0
        self.used_ahead = 0
        self.ahead_fault: Exception | None = None
        """Why nothing is encoded ahead any more."""
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._question is not None

    def ask(self, question: Question) -> None:
        """Begin to think; only while not busy."""
        with self._wake:
            if self._question is not None:
                raise RuntimeError("still thinking about the previous observation")
            self._question = question
            self._frames.clear()
            self._offers.clear()
            self._wake.notify()

    def prepare(self, frames: Mapping[str, Sample[bytes]]) -> None:
        """Encode these pictures, by camera, unless a question comes first; each is taken once."""
        fresh = {
            role: frame
            for role, frame in frames.items()
            if self._offered.get(role) is not frame.item and self._offers[role] < AHEAD_PER_THOUGHT
        }
        if not fresh or self.ahead_fault is not None:
            return
        for role, frame in fresh.items():
            self._offered[role] = frame.item
            self._offers[role] += 1
        with self._wake:
            self._frames.update(fresh)
            self._wake.notify()

    def close(self, timeout_s: float = 5.0) -> bool:
        """End the thread after the thought under way; False if it did not end in time."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def expected_latency_s(self) -> float:
        """What the next answer may take: the slowest of the last ten."""
        return max(list(self.latencies_s)[-10:], default=self._habits.first_latency_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._question is not None or self._frames or self._ending)
                if self._ending:
                    return
                question = self._question
                role, frame = self._frames.popitem() if question is None else ("", None)
            if question is None:
                assert frame is not None
                self._encode(role, frame)
                continue
            thought = self._think(question)
            self._on_thought(thought)
            self._question = None

    def _encode(self, role: str, frame: Sample[bytes]) -> None:
        try:
            picture = self._observer.decode_picture(role, frame.item)
        except UserError:
            return  # the thought that must use this picture says what is wrong with it
        number = next(_numbers)
        try:
            if not self._runner.encode_camera(role, picture, number):
                raise UserError("the policy takes the plain path, which encodes all cameras together")
        except Exception as error:  # handed over: the node says so, and goes on without
            self.ahead_fault = error
            return
        self.encoded_ahead += 1
        self._prepared[role] = Prepared(frame.item, picture, number)

    def _ready(self, question: Question) -> dict[str, Prepared]:
        samples, cameras = question.observation.samples, self._observer.spec.cameras
        return {
            role: prepared
            for role, prepared in self._prepared.items()
            if prepared.item is samples[cameras[role].stream].item
        }

    def _think(self, question: Question) -> Thought:
        started = time.monotonic()
        seen: Decoded | None = None
        try:
            ready = self._ready(question)
            seen = self._observer.decode(question.observation, {r: p.picture for r, p in ready.items()})
            chunk = self._chunk(question, seen, {role: p.number for role, p in ready.items()})
            self.used_ahead += len(ready)
        except Exception as error:  # handed over: the node reports it and publishes nothing
            return Thought(question, None, seen, error)
        self.latencies_s.append(time.monotonic() - started)
        return Thought(question, chunk, seen, None)

    def _chunk(self, question: Question, seen: Decoded, encoded: Mapping[str, int]) -> ActionChunk:
        habits = self._habits
        prefix, delay = None, 0
        if habits.realtime:
            latency_s = self.expected_latency_s() * habits.time_factor()
            prefix, delay = to_continue(
                habits.spec, question.previous, seen.state, seen.t_ns, latency_s, habits.n_action_steps
            )
        # It must agree with what will be executed before it arrives, however short the policy's horizon.
        horizon = max(habits.execution_horizon, delay) if prefix is not None else None
        values = self._runner.chunk(
            seen.images,
            seen.state,
            question.instruction.sentence,
            prefix=prefix,
            delay=delay,
            execution_horizon=horizon,
            seed=habits.seed,
            stamps=encoded,
        ).astype(np.float64)
        times_ns = uniform_times_ns(len(values), habits.fps)
        if not habits.realtime:
            late_ns = max(0, habits.now_ns() - seen.t_ns)
            values, times_ns = in_turns(values, times_ns, habits.n_action_steps, late_ns)
        self._sequence += 1
        return ActionChunk(
            stamp_ns=seen.t_ns,
            times_ns=times_ns,
            names=habits.names,
            values=values,
            task=question.instruction.task,
            sequence=self._sequence,
            fingerprint=habits.fingerprint,
        )
