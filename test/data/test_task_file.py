"""A task's name and sentence, from a shipped file or one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kuavo_smolvla_ros.data.task_file import find_task, shipped_tasks
from kuavo_smolvla_ros.errors import UsageError

OWN = """task:
  name: task5_cups
  instruction: >-
    Stack the cups
    in the corner
"""


def test_shipped_tasks_are_found_by_name() -> None:
    found = {name: find_task(name) for name in shipped_tasks()}
    assert list(found) == ["task1_moving_grasp", "task2_weighing", "task3_placement", "task4_sorting"]
    for name, task in found.items():
        assert task is not None
        assert task.name == name


def test_one_of_ones_own_is_found_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "any name.yaml"
    file.write_text(OWN)
    task = find_task(str(file))
    assert task is not None
    assert (task.name, task.instruction) == ("task5_cups", "Stack the cups in the corner")


@pytest.mark.parametrize(
    "text", ["task5_cups", "", "a b", "../task1_moving_grasp", "tasks/task1_moving_grasp"]
)
def test_another_name_is_no_task(text: str) -> None:
    assert find_task(text) is None


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file"),
        ("task: [", "is no YAML, line "),
        ("just text", "holds no settings"),
        ("", "holds no settings"),
        ("task: 5", "gives no task.name"),
        ("task: {name: task5}", "gives no task.instruction"),
        ("task: {name: task5, instruction: ' '}", "gives no task.instruction"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str | None, complaint: str) -> None:
    file = tmp_path / "own.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=complaint) as raised:
        find_task(str(file))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
