"""The scripted experts by task number. A new expert is added to `EXPERTS` here and nowhere else."""

from __future__ import annotations

from kuavo_smolvla_ros.sim.expert import Expert
from kuavo_smolvla_ros.sim.experts.belt_sorting import BeltSortingExpert
from kuavo_smolvla_ros.sim.experts.bottle_righting import BottleRightingExpert
from kuavo_smolvla_ros.sim.experts.parcel_weighing import ParcelWeighingExpert
from kuavo_smolvla_ros.sim.experts.shelf_transport import ShelfTransportExpert
from kuavo_smolvla_ros.sim.simulation import Simulation

EXPERTS: dict[int, type[Expert]] = {
    1: BeltSortingExpert,
    2: ParcelWeighingExpert,
    3: BottleRightingExpert,
    4: ShelfTransportExpert,
}


def make_expert(sim: Simulation, seed: int) -> Expert:
    """The expert for a simulation that was just reset; the seed chooses its manner."""
    return EXPERTS[sim.task.number](sim, seed)
