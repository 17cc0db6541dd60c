"""The documents name only commands, options, targets, files and headings that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuavo_smolvla_ros.cli import COMMANDS, build_parser
from kuavo_smolvla_ros.nodes.bringup import BRINGUPS, LOOPBACK
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
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return "\n".join([*blocks(text), *inline])


def blocks(text: str) -> list[str]:
    """What is to be typed into a shell; files and outputs have another language, or none that is one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in ("sh", "console", "")]


def commands(text: str) -> list[list[str]]:
    """The commands of the blocks, as words; 1 stands for a variable."""
    found = []
    for block in blocks(text):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            try:
                words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
            except ValueError:  # an open quote: a value over several lines, or no command at all
                continue
            if words:
                found.append(words)
    return found


def slug(heading: str) -> str:
    """The anchor GitHub gives a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@lru_cache(maxsize=64)
def anchors(document: Path) -> frozenset[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return frozenset(slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE))


@lru_cache(maxsize=32)
def program(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_targets_exist(text: str) -> None:
    assert set(re.findall(r"\bmake ([a-z-]+)", in_code(text))) <= TARGETS


def test_commands_exist(text: str) -> None:
    assert set(re.findall(r"kuavo-smolvla ([a-z]+)", in_code(text))) <= set(COMMANDS)


def test_options_exist(text: str) -> None:
    for words in commands(text):
        if words[0] == "kuavo-smolvla" and "..." not in words:
            build_parser().parse_args(words[1:])  # exits where an option is none
        if words[0] == "python" and words[1].startswith("training/"):
            assert (ROOT / words[1]).is_file(), words[1]
            parse = getattr(program(words[1]), "parse", None)
            if parse is not None:
                parse(words[2:])


def test_arguments_of_bringup_exist(text: str) -> None:
    for line in in_code(text).splitlines():
        found = re.match(
            r"(?:kuavo-smolvla bringup|ros2 launch kuavo_smolvla_ros) (\w+)(?:\.launch\.py)?", line
        )
        if found is not None:
            known = {argument.name for argument in (*BRINGUPS[found[1]].arguments, LOOPBACK)}
            assert set(re.findall(r"(\w+):=", line)) <= known, line


def test_programs_exist(text: str) -> None:
    for path in re.findall(r"\b((?:training|benchmarks|tools|test)/[\w/]+\.py)\b", in_code(text)):
        assert (ROOT / path).is_file(), path


def test_links_lead_somewhere(document: Path, text: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = document if not place else document.parent / place
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.resolve()), (
            f"{link}: there are {sorted(anchors(target))}"
        )


def test_the_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for document in (ROOT / "docs").glob("*.md"):
        assert document.name == "README.md" or f"({document.name})" in index, document.name


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
