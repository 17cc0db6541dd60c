"""The scripted experts by task number. A new one of the package is added to `EXPERTS` here and nowhere else;
one's own stands with its task (`sim/own_tasks.py`)."""

from __future__ import annotations

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.expert import Expert
from kuavo_smolvla_ros.sim.experts.belt_sorting import BeltSortingExpert
from kuavo_smolvla_ros.sim.experts.bottle_righting import BottleRightingExpert
from kuavo_smolvla_ros.sim.experts.parcel_weighing import ParcelWeighingExpert
from kuavo_smolvla_ros.sim.experts.shelf_transport import ShelfTransportExpert
from kuavo_smolvla_ros.sim.own_tasks import own_tasks
from kuavo_smolvla_ros.sim.simulation import Simulation

EXPERTS: dict[int, type[Expert]] = {
    1: BeltSortingExpert,
    2: ParcelWeighingExpert,
    3: BottleRightingExpert,
    4: ShelfTransportExpert,
}


def make_expert(sim: Simulation, seed: int) -> Expert:
    """The expert for a simulation that was just reset; the seed chooses its manner."""
    number = sim.task.number
    if number in EXPERTS:
        return EXPERTS[number](sim, seed)
    own = own_tasks().get(number)
    if own is None or own.expert is None:
        raise UsageError(f"task {number} has no scripted expert; set EXPERT in its file (docs/tutorial.md)")
    return own.expert(sim, seed)
