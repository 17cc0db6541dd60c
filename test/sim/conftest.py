"""One compiled simulation per task and level, shared by the tests of this room; each test resets it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.tasks import make_task


@pytest.fixture(scope="session")
def _simulations() -> dict[tuple[int, str], Simulation]:
    return {}


@pytest.fixture
def simulation(_simulations: dict[tuple[int, str], Simulation]) -> Callable[..., Simulation]:
    """`simulation(1, "contest", seed=3)`: state only, freshly reset."""

    def get(number: int = 1, level: str = "easy", seed: int = 0) -> Simulation:
        key = (number, level)
        if key not in _simulations:
            _simulations[key] = Simulation(make_task(number, level))
        sim = _simulations[key]
        sim.set_latency(0.0)
        sim.reset(seed)
        return sim

    return get
