"""What a task is called and what the robot is told: both stand once, in the task's own YAML.

Recorder, conversion and training take the same word for a task: the name of one that is shipped
(`config/policy/tasks`), or the path of a file of one's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.paths import config_dir

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class NamedTask:
    """A task's name and its sentence."""

    name: str
    instruction: str


def is_task_path(text: str) -> bool:
    """Whether this means a file rather than a name."""
    return text.endswith(SUFFIXES)


def shipped_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in (config_dir() / "policy" / "tasks").glob("*.yaml"))


def read_task_yaml(path: str | Path) -> dict[str, Any]:
    """All of a task's file; one sentence where it is not there or no YAML."""
    path = Path(path).expanduser()
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the task file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "it is no text"
        raise UsageError(f"the task file {path} is no YAML{where}: {problem}") from None
    if not isinstance(given, dict):
        raise UsageError(f"the task file {path} holds no settings; it needs a section 'task'")
    return given


def read_named_task(path: str | Path) -> NamedTask:
    """Name and sentence out of a task's file."""
    task = read_task_yaml(path).get("task")
    found = [task.get(key) if isinstance(task, dict) else None for key in ("name", "instruction")]
    for key, value in zip(("name", "instruction"), found, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"the task file {path} gives no task.{key}; set it to a text")
    return NamedTask(found[0].strip(), " ".join(found[1].split()))


def find_task(text: str) -> NamedTask | None:
    """The task meant by a name or a path; None for a name that no shipped task has."""
    if is_task_path(text):
        return read_named_task(text)
    if not re.fullmatch(r"\w+", text) or text not in shipped_tasks():
        return None
    return read_named_task(config_dir() / "policy" / "tasks" / f"{text}.yaml")
