"""One episode of the belt with a policy that takes its time, in simulated time throughout.

What is between policy and arm is the package's own: when the next thought is due and how its chunk is timed
(`nodes/turns.py`), splices, limits and stops (`control/executor.py`). An answer to an observation made at t
is worked out at once and handed over at t + latency; the machine's own speed plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from support.belt_pick import Judge, Observation, Outcome, Picker, Trouble

from kuavo_smolvla_ros.control.chunk import NS_PER_S, ActionChunk, uniform_times_ns
from kuavo_smolvla_ros.control.executor import Executor
from kuavo_smolvla_ros.control.records import Inputs, JointSample
from kuavo_smolvla_ros.control.settings import Settings, settings_for
from kuavo_smolvla_ros.nodes.turns import continued, in_turns, next_due_ns
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

CHUNK = 50
CONTROL_NS = round(kuavo.CONTROL_PERIOD_S * NS_PER_S)
BEGIN_NS = NS_PER_S  # a stamp of zero would read as "not filled in"
LOOK_EVERY = 10


@dataclass(frozen=True)
class Cell:
    """What is varied."""

    latency_s: float
    n_action_steps: int
    realtime: bool

    @property
    def mode(self) -> str:
        return "realtime" if self.realtime else "synchronous"


class Mind:
    """Asks the policy when it is time, and hands its chunks over when they are ready."""

    def __init__(self, cell: Cell, picker: Picker, spec: RobotSpec) -> None:
        self.cell, self.picker, self.spec = cell, picker, spec
        self.thoughts = 0
        self._previous: ActionChunk | None = None
        self._due_ns = 0
        self._coming: tuple[int, ActionChunk] | None = None

    def look(self, now_ns: int, seen: Observation) -> tuple[ActionChunk, ...]:
        """The chunk that is ready now, if one is."""
        ready: tuple[ActionChunk, ...] = ()
        if self._coming is not None and now_ns >= self._coming[0]:
            ready, self._previous, self._coming = (self._coming[1],), self._coming[1], None
            self._due_ns = next_due_ns(self._previous, self.cell.n_action_steps, self.spec.fps)
        if self._coming is None and now_ns >= self._due_ns:
            latency_ns = round(self.cell.latency_s * NS_PER_S)
            self._coming = now_ns + latency_ns, self._chunk(now_ns, seen, latency_ns)
        return ready

    def _chunk(self, now_ns: int, seen: Observation, latency_ns: int) -> ActionChunk:
        cell, fps = self.cell, self.spec.fps
        prefix, delay = None, 0
        if cell.realtime:
            prefix, delay = continued(self._previous, now_ns, fps, cell.latency_s)
        values = self.picker.chunk(seen, CHUNK, prefix, delay)
        times_ns = uniform_times_ns(len(values), fps)
        if not cell.realtime:
            values, times_ns = in_turns(values, times_ns, cell.n_action_steps, latency_ns)
        self.thoughts += 1
        names, fingerprint = self.spec.action_names, self.spec.fingerprint
        return ActionChunk(now_ns, times_ns, names, values, "belt", self.thoughts, fingerprint)


class Bench(NamedTuple):
    """What takes a second to make and serves all episodes of a process."""

    spec: RobotSpec
    sim: Simulation
    picker: Picker
    settings: Settings


@lru_cache(1)
def workbench() -> Bench:
    spec = load_spec("kuavo_sim")
    sim = Simulation(make_task(1, "contest"))
    # Neither a late policy nor a first chunk far ahead of the arms must end the episode: they wait for the
    # one and ramp to the other.
    settings = settings_for(spec, starvation_latches=False, refuse_above=3.0)
    return Bench(spec, sim, Picker(sim.task.ready_state()), settings)


def run_episode(cell: Cell, seed: int, trouble: Trouble | None = None) -> Outcome:
    """The episode of this seed; its trouble too comes from the seed where none is given."""
    spec, sim, picker, settings = workbench()
    sim.reset(seed)
    trouble = Trouble.draw(seed) if trouble is None else trouble
    judge, mind, executor = Judge(), Mind(cell, picker, spec), Executor(settings)
    commanded = [settings.names.index(name) for name in spec.action_names]
    still = np.zeros(len(settings.measured_names) - len(spec.state_names))
    for period in range(1, 1_000_000):
        now_ns = BEGIN_NS + period * CONTROL_NS
        trouble.apply(sim)
        joints = JointSample(now_ns, now_ns, np.concatenate([sim.state(), still]))
        chunks = mind.look(now_ns, Observation.of(sim, trouble))
        decision = executor.step(Inputs(now_ns, now_ns, joints, chunks, policy_heard_ns=now_ns))
        if decision.command is not None:
            sim.command(decision.command[commanded])
        sim.step()
        if period % LOOK_EVERY == 0 and (how := judge.verdict(sim)) is not None:
            return Outcome(how == "lifted", round(sim.time_s, 2), how, mind.thoughts)
    raise AssertionError("the judge never ended the episode")
