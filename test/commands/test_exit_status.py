"""Every command line tool ends the same way: a status, and a sentence where something is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kuavo_smolvla_ros.errors import UsageError, UserError, exit_status

MAKES_AN_ASSET = "train_tiny_tokenizer"  # for maintainers; nothing is given to it that could be bad
TRAINING = Path(__file__).parents[2] / "training"
PROGRAMS = sorted(file for file in TRAINING.glob("*.py") if file.stem != MAKES_AN_ASSET)


def failing(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize("status", [0, 1, 2, 7])
def test_what_a_tool_returns_is_its_status(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("tool", lambda: status) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("error", "status"), [(UserError("the bag is empty"), 1), (UsageError("no bag"), 2)])
def test_an_error_is_a_sentence_under_the_tools_name(
    error: UserError, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status("tool", lambda: failing(error)) == status
    assert capsys.readouterr() == ("", f"tool: {error}\n")


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_ones_mistake_is_not_swallowed(error: BaseException) -> None:
    with pytest.raises(type(error)):
        exit_status("tool", lambda: failing(error))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs_end_by_it_under_their_own_name(program: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(program.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "exit_status"
    ]
    names = [ast.literal_eval(call.args[0]) for call in calls]
    assert names == [program.stem]
