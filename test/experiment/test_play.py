from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kuavo_smolvla_ros.experiment.play import Manner, play
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.sim.episode import run_expert
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

CHUNK, REST = 16, 6


class Remembers:
    """Tells the rest of an expert's episode from now on: a policy that knows its way by heart."""

    def __init__(self, sim: Simulation, seed: int) -> None:
        self._sim = sim
        sim.reset(seed)
        # A moment at rest, so that the first chunk finds the arms where it says.
        self._way = [sim.target.copy() for _ in range(REST)]
        run_expert(sim, seed, on_step=lambda action: self._way.append(action.copy()))
        self._asked: list[dict[str, Any]] = []

    def chunk(
        self,
        images: Mapping[str, NDArray[np.uint8]],
        state: NDArray[np.float64],
        instruction: str,
        **how: Any,
    ) -> NDArray[np.float64]:
        self._asked.append({"instruction": instruction, "time_s": self._sim.time_s, **how})
        first = round(self._sim.time_s * 10)
        rows = [self._way[min(first + i, len(self._way) - 1)] for i in range(CHUNK)]
        width = max(map(len, rows))
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self._asked


@pytest.fixture(scope="module")
def bottles() -> Simulation:
    return Simulation(make_task(3))


@pytest.mark.parametrize("latency_s", [0.0, 0.3])
def test_who_knows_the_way_succeeds_however_late_chunks_arrive(bottles: Simulation, latency_s: float) -> None:
    """Chunks are time-stamped: what is late in them is left out, and the rest is still right."""
    thinker = Remembers(bottles, 3)
    played = play(bottles, load_spec("kuavo_sim"), thinker, 3, Manner(latency_s=latency_s))
    assert played.success
    assert played.score >= 90.0
    assert 0.5 < played.moved_rad < 4.0
    assert played.stops == ()


def test_one_inference_at_a_time_and_not_before_it_is_due(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    manner = Manner(latency_s=0.5, n_action_steps=3)
    play(bottles, load_spec("kuavo_sim"), thinker, 3, manner, until_s=3.0)
    gaps = np.diff([asked["time_s"] for asked in thinker.asked])
    assert gaps.min() >= 0.5 - 1e-6
    manner = dataclasses.replace(manner, latency_s=0.1)
    thinker.asked.clear()
    play(bottles, load_spec("kuavo_sim"), thinker, 3, manner, until_s=3.0)
    gaps = np.diff([asked["time_s"] for asked in thinker.asked])
    np.testing.assert_allclose(gaps, 0.3, atol=0.011)


def test_a_chunk_is_told_what_is_left_of_the_one_before(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    play(bottles, load_spec("kuavo_sim"), thinker, 3, Manner(latency_s=0.2, n_action_steps=4), until_s=2.0)
    first, second = thinker.asked[:2]
    assert (first["prefix"].shape, first["delay"]) == ((3, 16), 3)  # the arms will have stood still
    assert second["prefix"].shape == (CHUNK - 4, 16)
    assert second["delay"] == 2
    thinker.asked.clear()


def test_in_turns_the_arms_wait_for_each_chunk(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    manner = Manner(latency_s=0.3, n_action_steps=5, realtime=False)
    play(bottles, load_spec("kuavo_sim"), thinker, 3, manner, until_s=4.0)
    assert all(asked["prefix"] is None for asked in thinker.asked)
    # Five steps of 0.1 s after each wait of 0.3 s.
    np.testing.assert_allclose(np.diff([asked["time_s"] for asked in thinker.asked]), 0.8, atol=0.011)


def test_the_sentence_is_the_tasks_or_the_one_given(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    spec = load_spec("kuavo_sim")
    play(bottles, spec, thinker, 3, Manner(), until_s=0.5)
    play(bottles, spec, thinker, 3, Manner(), until_s=0.5, sentence="sing")
    assert {asked["instruction"] for asked in thinker.asked} == {bottles.task.instruction, "sing"}


def test_each_inference_has_a_seed_of_its_own(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    play(bottles, load_spec("kuavo_sim"), thinker, 3, Manner(), until_s=2.0)
    seeds = [asked["seed"] for asked in thinker.asked]
    assert len(set(seeds)) == len(seeds) > 3


def test_a_leap_is_refused_and_the_arms_stay(bottles: Simulation) -> None:
    class Leaps:
        def chunk(self, images: Any, state: NDArray[np.float64], instruction: str, **how: Any) -> Any:
            return np.tile(state + np.where(np.arange(16) == 3, -1.5, 0.0), (CHUNK, 1))

    bottles.reset(3)
    before = bottles.state()
    played = play(bottles, load_spec("kuavo_sim"), Leaps(), 3, Manner(), until_s=1.5)
    assert played.refused == played.chunks > 0
    assert not played.success
    assert played.moved_rad < 0.05
    np.testing.assert_allclose(bottles.state(), before, atol=0.05)


def test_the_same_seed_is_played_the_same(bottles: Simulation) -> None:
    thinker = Remembers(bottles, 3)
    played = [play(bottles, load_spec("kuavo_sim"), thinker, 3, Manner(), until_s=3.0) for _ in range(2)]
    assert played[0] == played[1]
    assert played[0].chunks > 3


def test_a_robot_that_walks_walks() -> None:
    sim = Simulation(make_task(4))
    thinker = Remembers(sim, 3)
    thinker._way[:REST] = [np.concatenate([rest, np.zeros(4)]) for rest in thinker._way[:REST]]
    played = play(sim, load_spec("kuavo_mobile"), thinker, 3, Manner(latency_s=0.1), until_s=8.0)
    assert played.score >= 20.0  # stood where the item is to be picked
