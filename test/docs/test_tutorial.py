"""docs/tutorial.md is executed: its files are written, its commands are run, in their order, in small."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kuavo_smolvla_ros.cli import main as kuavo_smolvla
from kuavo_smolvla_ros.paths import share_dir
from kuavo_smolvla_ros.policy.checkpoint import read_json

ROOT = share_dir()
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# The variables that the tutorial says make it small, smaller still.
SIZES = {"EPISODES": "3", "STEPS": "3", "TRIALS": "1"}
BLOCK = re.compile(r"(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<kind>\w+)\n(?P<body>.*?)```", re.DOTALL)
FILE = re.compile(r"# (?P<path>mine/\S+?)(?P<more>, continued)?\n(?P<text>.*)", re.DOTALL)
PROGRAMS = ("convert_bags", "train_sequential", "evaluate")


@dataclass(frozen=True)
class Block:
    """A code block, and what the comment before it says of it."""

    kind: str
    body: str
    note: str

    @property
    def file(self) -> tuple[str, str, str] | None:
        """Path, mode and content, for a block that is a file."""
        found = FILE.fullmatch(self.body)
        return found and (found["path"], "a" if found["more"] else "w", found["text"])


BLOCKS = [Block(m["kind"], m["body"], m["note"] or "") for m in BLOCK.finditer(TEXT)]


def commands(body: str) -> list[str]:
    """A shell block's commands; an open quote runs on over lines."""
    found, open_lines = [], ""
    for line in body.splitlines():
        open_lines += line + "\n"
        if open_lines.count('"') % 2 == 0:
            found.append(open_lines.strip())
            open_lines = ""
    assert not open_lines, f"an open quote in {body}"
    return [text for text in found if text and not text.startswith("#")]


class Shell:
    """As much of a shell as the tutorial uses, in this process.

    To read torch again for each command would take longer than what they do.
    """

    def __init__(self, folder: Path) -> None:
        self.variables = {"PWD": str(folder)}

    def run(self, text: str) -> None:
        if text.startswith("export "):
            for name, value in self._assignments(text):
                self.variables[name] = os.environ[name] = SIZES.get(name, value)
            return
        words = shlex.split(self._expand(text), comments=True)
        if words[:2] in (["source", ".venv/bin/activate"], ["mkdir", "-p"]):
            for folder in words[2:]:
                Path(folder).mkdir(parents=True, exist_ok=True)
            return
        assert self._program(words) == 0, text

    def _assignments(self, text: str) -> Iterator[tuple[str, str]]:
        for name, value in (
            word.split("=", 1) for word in shlex.split(text.removeprefix("export "), comments=True)
        ):
            yield name, self._expand(value)

    def _expand(self, text: str) -> str:
        return string.Template(text).substitute(self.variables)

    def _program(self, words: list[str]) -> int:
        if words[0] == "kuavo-smolvla":
            return kuavo_smolvla(words[1:])
        name = Path(words[1]).stem
        assert words[0] == "python", words
        assert name in PROGRAMS, f"{words[1]} is a program this test does not know"
        spec = importlib.util.spec_from_file_location(name, ROOT / words[1])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        status: int = module.main(words[2:])
        return status


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to walk through the tutorial in."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(
        r"(\w+)=", "".join(b.body for b in BLOCKS if b.kind == "sh" and "export" in b.body)
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that what is exported is taken back
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write_file(block: Block, folder: Path) -> bool:
    if block.file is None:
        return False
    path, mode, content = block.file
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with (folder / path).open(mode, encoding="utf-8") as file:
        file.write(content)
    return True


def test_every_block_is_a_file_a_script_or_left_to_the_reader() -> None:
    for block in BLOCKS:
        assert block.kind in ("sh", "console") if block.file is None else block.kind in ("yaml", "python")
    assert [b.file[0] for b in BLOCKS if b.file] == [
        "mine/task5_lift_block.yaml",
        "mine/lift_block.py",
        "mine/lift_block.py",
        "mine/small_kuavo.yaml",
    ]
    assert set(SIZES) <= set(re.findall(r"\b([A-Z]+)=\d", TEXT))  # what is made smaller is a variable there


def test_the_tutorial_from_its_first_line_to_its_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(folder)
    for block in BLOCKS:
        if write_file(block, folder) or block.kind != "sh" or block.note.startswith("slow"):
            continue
        for command in commands(block.body):
            shell.run(command)
    said = capsys.readouterr().out
    assert "task 5 (contest, seed 3): succeeded" in said
    assert "added 3 episodes" in said
    assert "task5_lift_block (stage " in said  # the dry run
    assert "task 5 task5_lift_block: " in said  # evaluated
    checkpoint = folder / "outputs/mine/alone/task5_lift_block/best"
    (sentences,) = read_json(checkpoint / "config.json")["tasks"].values()
    sentence = sentences[0]
    assert f'instruction:="{sentence}"' in TEXT
    assert json.loads((checkpoint.parent / "success.json").read_text())["tasks"]["5"]["trials"] == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_as_a_shell_runs_it(folder: Path) -> None:
    """All of it with real processes, what drives the simulated arms over ROS too."""
    script, last = ["set -e"], ""
    for block in BLOCKS:
        if write_file(block, folder) or block.kind != "sh":
            continue
        if "until Ctrl-C" in block.note:
            (last,) = commands(block.body)
            continue
        script += [_sized(c) for c in commands(block.body) if not c.startswith("source ")]
    for name in ("training", "config"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ROS_DOMAIN_ID": "87",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join([*script, "env > environment"])],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads((folder / "outputs/mine/two/forgetting.json").read_text())
    assert told["curriculum"]["tasks"] == ["1", "5"]
    exported = "export KUAVO_TASKS=$PWD/mine/lift_block.py"
    log = folder / "log"
    with log.open("w") as file:
        running = subprocess.Popen(
            ["bash", "-c", f"{exported}\nexec {last}"], cwd=folder, env=environment, stdout=file, stderr=file
        )
        try:
            _wait_for(
                log, running, "task5_lift_block: Lift the red block", "active: publishing action chunks"
            )
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(30)


def _sized(command: str) -> str:
    for name, value in SIZES.items():
        command = re.sub(rf"\b{name}=\d+", f"{name}={value}", command)
    return command


def _wait_for(log: Path, process: subprocess.Popen[bytes], *sentences: str) -> None:
    deadline = time.monotonic() + 180
    while not all(sentence in log.read_text() for sentence in sentences):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
