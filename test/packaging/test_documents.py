"""The documents name only commands, targets and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kuavo_smolvla_ros.cli import COMMANDS
from kuavo_smolvla_ros.paths import share_dir

ROOT = share_dir()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.name)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def in_code(text: str) -> str:
    return "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))


def test_make_targets_exist(text: str) -> None:
    assert set(re.findall(r"\bmake ([a-z-]+)", in_code(text))) <= TARGETS


def test_commands_exist(text: str) -> None:
    assert set(re.findall(r"kuavo-smolvla ([a-z]+)", in_code(text))) <= set(COMMANDS)


def test_links_lead_somewhere(document: Path, text: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (document.parent / link).exists(), link


def test_named_robots_exist(text: str) -> None:
    for name in re.findall(r"kuavo-smolvla check ([\w./]+)", in_code(text)):
        assert (ROOT / "config" / "robot" / f"{name}.yaml").is_file(), name


def test_the_readme_begins_with_the_two_commands() -> None:
    first = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].strip().splitlines()] == [
        "make demo",
        "make test",
    ]


def test_hooks_run_what_ci_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ci = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert [hook["entry"].split()[1] for hook in hooks] == ci[1:-1]
    assert (ci[0], ci[-1]) == ("setup", "test")
