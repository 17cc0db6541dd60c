"""Writes config/gazebo: the world, and the bridge's list of topics, both from the description kuavo_gazebo.

python -m kuavo_smolvla_ros.nodes.gazebo_files            write them
python -m kuavo_smolvla_ros.nodes.gazebo_files --check    exit 1 where a file is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kuavo_smolvla_ros.nodes import gazebo_mapping, gazebo_world
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.robot.spec import load_spec

ROBOT = "kuavo_gazebo"


def folder() -> Path:
    return config_dir() / "gazebo"


def world_file() -> Path:
    return folder() / "kuavo.sdf"


def bridge_file() -> Path:
    return folder() / "bridge.yaml"


def contents() -> dict[Path, str]:
    """Each file, and what belongs into it."""
    spec = load_spec(ROBOT)
    return {world_file(): gazebo_world.world(spec), bridge_file(): gazebo_mapping.as_yaml(spec)}


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    given = parser.parse_args(args)
    stale = []
    for path, text in contents().items():
        if path.is_file() and path.read_text() == text:
            continue
        stale.append(path)
        if not given.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        print(f"{path}: {'is not what the description gives' if given.check else 'written'}")
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
