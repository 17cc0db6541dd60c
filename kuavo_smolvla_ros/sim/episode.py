"""Run one episode from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Score


@dataclass(frozen=True)
class Episode:
    """How an episode went; `time_s` is when it succeeded, or its end."""

    seed: int
    score: Score
    time_s: float


def run_expert(
    sim: Simulation,
    seed: int,
    *,
    on_step: Callable[[NDArray[np.float64]], None] | None = None,
    watch: Callable[[], None] | None = None,
    after_success_s: float = 0.5,
) -> Episode:
    """Reset to a seed and let the expert act until success (and a moment more) or the task's time is over.

    `on_step` sees every action just before it is executed, with the simulation still in the state it
    answers to; `watch` is called after every control period.
    """
    sim.reset(seed)
    expert = make_expert(sim, seed)
    succeeded_at_s: float | None = None
    while sim.time_s < sim.task.time_limit_s - 0.5 * kuavo.POLICY_PERIOD_S:
        action = expert.action()
        if on_step is not None:
            on_step(action)
        sim.act(action, watch)
        if succeeded_at_s is None and sim.score().success:
            succeeded_at_s = sim.time_s
        if succeeded_at_s is not None and sim.time_s >= succeeded_at_s + after_success_s:
            break
    return Episode(seed, sim.score(), sim.time_s if succeeded_at_s is None else succeeded_at_s)


def run_still(sim: Simulation, seed: int, *, watch: Callable[[], None] | None = None) -> Episode:
    """Reset to a seed and let the arms keep their ready pose until the task's time is over."""
    sim.reset(seed)
    while sim.time_s < sim.task.time_limit_s - 0.5 * kuavo.CONTROL_PERIOD_S:
        sim.step()
        if watch is not None:
            watch()
    return Episode(seed, sim.score(), sim.time_s)
