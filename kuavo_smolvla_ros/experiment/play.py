"""A policy plays an episode in simulated time, between it and the arms the executor that drives the robot.

What the policy and the executor node do by the clock happens here period by period: the same chunks with
their times, the same refusals, blends, limits and stops, and an inference that takes as long as it is said to
take. Nothing runs in parallel, so the same seed gives the same episode again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.control.chunk import NS_PER_S, ActionChunk, uniform_times_ns
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.reasons import State
from kuavo_smolvla_ros.control.records import Inputs, JointSample
from kuavo_smolvla_ros.control.settings import settings_for
from kuavo_smolvla_ros.nodes.turns import in_turns, next_due_ns, to_continue
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.simulation import Simulation

Array = NDArray[np.float64]
PERIOD_NS = round(kuavo.CONTROL_PERIOD_S * NS_PER_S)


class Thinks(Protocol):
    """The part of a policy that is asked here (`policy.runtime.PolicyRunner`)."""

    def chunk(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[np.float64],
        instruction: str,
        *,
        prefix: NDArray[np.float64] | None = None,
        delay: int = 0,
        execution_horizon: int | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float64]: ...


@dataclass(frozen=True)
class Manner:
    """How a policy is run: what an operator would set."""

    latency_s: float = 0.1
    """From the observation to the chunk's arrival, in the robot's time."""
    n_action_steps: int = 4
    """Steps after which the next observation is looked at."""
    realtime: bool = True
    """Think while moving, each chunk agreeing with the one under way; else the arms wait for each chunk."""
    execution_horizon: int = 10
    noise_scale: float = 0.5
    """Of the noise a chunk begins with. Less is more precise, and slower to leave where it waits."""


@dataclass(frozen=True)
class Played:
    """How an episode went; `stops` are the executor's reasons to stop, `refused` counts refused chunks.

    `moved_rad` is how far any joint of the arms got from where it began.
    """

    seed: int
    success: bool
    score: float
    time_s: float
    chunks: int
    refused: int
    stops: tuple[str, ...]
    moved_rad: float


def play(
    sim: Simulation,
    spec: RobotSpec,
    thinker: Thinks,
    seed: int,
    manner: Manner,
    *,
    sentence: str | None = None,
    until_s: float | None = None,
    watch: Callable[[], None] | None = None,
) -> Played:
    """One episode from its seed to success or the end of its time."""
    sim.reset(seed)
    sentence = sim.task.instruction if sentence is None else sentence
    mind = _Mind(spec, thinker, manner, sentence, sim.task.name, seed)
    executor = Executor(settings_for(spec, starvation_latches=False))
    limit_s = sim.task.time_limit_s if until_s is None else min(until_s, sim.task.time_limit_s)
    arms = [place for place, name in enumerate(spec.state_names) if spec.joints[name].unit == "rad"]
    began, moved_rad = sim.state()[arms], 0.0
    refused, period = 0, 0
    stops: list[str] = []
    while sim.time_s < limit_s - kuavo.CONTROL_PERIOD_S / 2 and not sim.score().success:
        # Time zero means "no clock yet" to those who read it.
        now_ns = (period + 1) * PERIOD_NS
        mind.look(sim, now_ns)
        joints = JointSample(now_ns, now_ns, sim.state())
        moved_rad = max(moved_rad, float(np.abs(joints.positions[arms] - began).max()))
        decision = executor.step(
            Inputs(now_ns, now_ns, joints, chunks=mind.arrived(now_ns), policy_heard_ns=now_ns)
        )
        refused += len(decision.refused)
        reason = decision.reason.value if decision.reason is not None else None
        if decision.state is State.STOPPING and reason is not None and stops[-1:] != [reason]:
            stops.append(reason)
        if decision.command is not None:
            sim.command(decision.command[: len(sim.action_names)])
        sim.step()
        if watch is not None:
            watch()
        period += 1
    score = sim.score()
    return Played(
        seed,
        bool(score.success),
        float(score.total),
        sim.time_s,
        mind.sequence,
        refused,
        tuple(stops),
        moved_rad,
    )


class _Mind:
    """The policy node's part: when to look, and when what was thought arrives."""

    def __init__(
        self, spec: RobotSpec, thinker: Thinks, manner: Manner, sentence: str, task: str, seed: int
    ) -> None:
        self._spec, self._thinker, self._manner = spec, thinker, manner
        self._sentence, self._task, self._seed = sentence, task, seed
        self._due_ns = 0
        self._on_its_way: tuple[int, ActionChunk] | None = None
        self._previous: ActionChunk | None = None
        self.sequence = 0

    def look(self, sim: Simulation, now_ns: int) -> None:
        """Observe and think where it is time to."""
        if self._on_its_way is not None or now_ns < self._due_ns:
            return
        fps, manner = self._spec.fps, self._manner
        state = sim.state()
        prefix, delay = None, 0
        if manner.realtime:
            prefix, delay = to_continue(
                self._spec, self._previous, state, now_ns, manner.latency_s, manner.n_action_steps
            )
        values = self._thinker.chunk(
            sim.images(),
            state,
            self._sentence,
            prefix=prefix,
            delay=delay,
            execution_horizon=None if prefix is None else max(manner.execution_horizon, delay),
            # One of its own for each inference, so that an episode is the same again.
            seed=self._seed * 10_000 + self.sequence,
        )
        self.sequence += 1
        names, latency_ns = self._spec.action_names, round(manner.latency_s * NS_PER_S)
        values = np.asarray(values, np.float64)[:, : len(names)]
        times_ns = uniform_times_ns(len(values), fps)
        if not manner.realtime:
            values, times_ns = in_turns(values, times_ns, manner.n_action_steps, latency_ns)
        chunk = ActionChunk(
            stamp_ns=now_ns,
            times_ns=times_ns,
            names=names,
            values=values,
            task=self._task,
            sequence=self.sequence,
            fingerprint=self._spec.fingerprint,
        )
        self._on_its_way = now_ns + latency_ns, chunk
        self._previous = chunk
        self._due_ns = next_due_ns(chunk, manner.n_action_steps, fps)

    def arrived(self, now_ns: int) -> tuple[ActionChunk, ...]:
        if self._on_its_way is None or now_ns < self._on_its_way[0]:
            return ()
        chunk, self._on_its_way = self._on_its_way[1], None
        return (chunk,)
