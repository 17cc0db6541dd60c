"""The tasks by number. A new task's class is added to `TASKS` here and nowhere else."""

from __future__ import annotations

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.own_tasks import VARIABLE, own_tasks
from kuavo_smolvla_ros.sim.task import Level, Task
from kuavo_smolvla_ros.sim.tasks.belt_sorting import BeltSorting
from kuavo_smolvla_ros.sim.tasks.bottle_righting import BottleRighting
from kuavo_smolvla_ros.sim.tasks.parcel_weighing import ParcelWeighing
from kuavo_smolvla_ros.sim.tasks.shelf_transport import ShelfTransport

TASKS: dict[int, type[Task]] = {
    task.number: task for task in (BeltSorting, ParcelWeighing, BottleRighting, ShelfTransport)
}


def task_numbers() -> list[int]:
    """The numbers `make_task` takes: those of the package, and of one's own (`KUAVO_TASKS`)."""
    return sorted({*TASKS, *own_tasks()})


def make_task(number: int, level: Level | str = Level.EASY) -> Task:
    """A task by number (1 to 4, or one of one's own) at a level ("easy" or "contest")."""
    own = own_tasks()
    taken = sorted(set(own) & set(TASKS))
    if taken:
        raise UsageError(
            f"{own[taken[0]].file} takes the number {taken[0]}, which the package has a task for"
        )
    if number not in TASKS and number not in own:
        raise UsageError(
            f"there is no task {number}; choose one of {', '.join(map(str, task_numbers()))}, or name the "
            f"file of your own in {VARIABLE} (docs/tutorial.md)"
        )
    try:
        chosen = Level(level)
    except ValueError:
        names = ", ".join(item.value for item in Level)
        raise UsageError(f"there is no level {level!r}; choose one of {names}") from None
    return (own[number].task if number in own else TASKS[number])(chosen)
