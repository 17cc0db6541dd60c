"""A robot with small cameras, recordings made of recipes, and a way to compare datasets byte by byte."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kuavo_smolvla_ros.data.recordings import Recording, find_recordings
from kuavo_smolvla_ros.data.synthetic import write_recipe
from kuavo_smolvla_ros.paths import config_dir

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="session")
def small_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """kuavo_sim with cameras of 96x64, as a path to its description."""
    streams = {"head_cam_h": "head_image", "wrist_cam_l": "left_image", "wrist_cam_r": "right_image"}
    path = tmp_path_factory.mktemp("spec") / "small.yaml"
    lines = [f"extends: {config_dir()}/robot/kuavo_sim.yaml", "cameras:"]
    lines += [f"  {c}: {{stream: {s}, height: {HEIGHT}, width: {WIDTH}}}" for c, s in streams.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def recipes(tmp_path: Path) -> Callable[..., list[Recording]]:
    """`recipes(a=[{...}], b=[...])`: recordings a.bag, b.bag in a folder of their own."""

    def make(folder: str = "bags", **recordings: list[dict[str, Any]]) -> list[Recording]:
        for name, episodes in recordings.items():
            write_recipe(tmp_path / folder / f"{name}.bag", *episodes)
        return find_recordings([tmp_path / folder])

    return make


@pytest.fixture
def locked() -> Iterator[Callable[[Path], Any]]:
    """`with locked(path) as copy`: a copy of the file that nobody may read, in the eyes of such a nobody."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)

        @contextmanager
        def lock(path: Path) -> Iterator[Path]:
            copy = Path(shutil.copy(path, folder))
            copy.chmod(0)
            user = os.geteuid()
            if user == 0:  # root reads everything
                os.seteuid(65534)
            try:
                yield copy
            finally:
                os.seteuid(user)

        yield lock


@pytest.fixture
def contents() -> Callable[[Path], dict[str, str]]:
    """Every file below a folder with a hash of its bytes."""

    def look(root: Path) -> dict[str, str]:
        files = (p for p in sorted(root.rglob("*")) if p.is_file())
        return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return look
