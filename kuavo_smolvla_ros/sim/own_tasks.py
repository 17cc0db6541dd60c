"""Tasks from outside the package: `KUAVO_TASKS` names the Python files, separated as in `PATH`.

Each file has the names `TASK`, a class derived from `sim.task.Task`, and, if a script can do the task,
`EXPERT`, a class derived from `sim.expert.Expert`. An environment variable, because all that starts a
simulation shall find them: the command line, the node, evaluation and its workers, LeRobot's own commands.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.task import Task

if TYPE_CHECKING:
    from kuavo_smolvla_ros.sim.expert import Expert

VARIABLE = "KUAVO_TASKS"


@dataclass(frozen=True)
class OwnTask:
    """A task's class, its expert's if it has one, and where both were found."""

    file: Path
    task: type[Task]
    expert: type[Expert] | None


def own_tasks() -> Mapping[int, OwnTask]:
    """The tasks of `KUAVO_TASKS` by number; each file is read once."""
    return _load(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=8)
def _load(places: str) -> Mapping[int, OwnTask]:
    found: dict[int, OwnTask] = {}
    for place in filter(None, places.split(os.pathsep)):
        own = _read(Path(place).expanduser())
        other = found.get(own.task.number)
        if other is not None:
            raise UsageError(f"{own.file} and {other.file} both have the task number {own.task.number}")
        found[own.task.number] = own
    return found


def _read(path: Path) -> OwnTask:
    from kuavo_smolvla_ros.sim.expert import Expert

    module = _module(path)
    task, expert = getattr(module, "TASK", None), getattr(module, "EXPERT", None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UsageError(f"{path} has no TASK; set it to your class derived from sim.task.Task")
    if expert is not None and not (isinstance(expert, type) and issubclass(expert, Expert)):
        raise UsageError(f"the EXPERT of {path} is no class derived from sim.expert.Expert")
    for name, kind in (("number", int), ("name", str), ("instruction", str), ("time_limit_s", (int, float))):
        if not isinstance(getattr(task, name, None), kind):
            raise UsageError(f"{task.__name__} in {path} sets no {name}")
    if task.__abstractmethods__:
        missing = ", ".join(sorted(task.__abstractmethods__))
        raise UsageError(f"{task.__name__} in {path} does not say {missing}; see the head of sim/task.py")
    return OwnTask(path, task, expert)


def _module(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{VARIABLE} names {path}, which is no file")
    name = f"kuavo_own_task_{path.resolve().as_posix().encode().hex()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{VARIABLE} names {path}, which is no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{path} ({VARIABLE}) does not load: {type(error).__name__}: {error}") from error
    return module
