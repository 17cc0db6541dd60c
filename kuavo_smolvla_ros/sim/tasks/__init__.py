"""The tasks by number. A new task's class is added to `TASKS` here and nowhere else."""

from __future__ import annotations

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.task import Level, Task
from kuavo_smolvla_ros.sim.tasks.belt_sorting import BeltSorting
from kuavo_smolvla_ros.sim.tasks.bottle_righting import BottleRighting
from kuavo_smolvla_ros.sim.tasks.parcel_weighing import ParcelWeighing
from kuavo_smolvla_ros.sim.tasks.shelf_transport import ShelfTransport

TASKS: dict[int, type[Task]] = {
    task.number: task for task in (BeltSorting, ParcelWeighing, BottleRighting, ShelfTransport)
}


def make_task(number: int, level: Level | str = Level.EASY) -> Task:
    """A task by number (1 to 4) at a level ("easy" or "contest")."""
    if number not in TASKS:
        raise UsageError(f"there is no task {number}; choose one of {', '.join(map(str, sorted(TASKS)))}")
    try:
        chosen = Level(level)
    except ValueError:
        names = ", ".join(item.value for item in Level)
        raise UsageError(f"there is no level {level!r}; choose one of {names}") from None
    return TASKS[number](chosen)
