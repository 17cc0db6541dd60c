"""The configuration reference says what the code says, and its writer finds what a class declares."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "configuration_reference", ROOT / "tools/configuration_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Example:
    # First things
    plain: int = 1
    beside: str = "a|b"  # said beside it
    # Said above it,
    # in two lines.
    above: float = 0.5

    # Second things. And more about them.
    last: bool = True


def test_the_page_is_what_the_code_says(reference: ModuleType) -> None:
    assert reference.PAGE.read_text() == reference.page(), "run: python tools/configuration_reference.py"


def test_fields_come_with_their_comments_and_headings(reference: ModuleType) -> None:
    assert list(reference.fields_with_comments(Example))[1:] == [
        ("", "beside", "`'a|b'`", "said beside it"),
        ("", "above", "`0.5`", "Said above it, in two lines."),
        ("Second things", "last", "`True`", ""),
    ]


def test_bars_do_not_break_tables(reference: ModuleType) -> None:
    assert "'a\\|b'" in reference.policy_fields(Example)


def test_check_refuses_another_page(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(reference, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["configuration_reference.py", "--check"])
    assert reference.main() == 1
    assert "run: python tools/configuration_reference.py" in capsys.readouterr().err
    page.write_text(reference.page())
    assert reference.main() == 0
