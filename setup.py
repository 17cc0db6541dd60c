"""What a ROS 2 installation needs besides the Python package: files under share/.

The metadata is in pyproject.toml.
"""

import os
from pathlib import Path

import setuptools

PACKAGE = "kuavo_smolvla_ros"
SHARE = f"share/{PACKAGE}"

if int(setuptools.__version__.split(".")[0]) < 64:
    raise SystemExit(
        f"setuptools {setuptools.__version__} cannot read pyproject.toml (64 or newer can). "
        "Run make setup, then: source .venv/bin/activate && python -m colcon build"
    )


def shipped(folder: str, *patterns: str) -> list[tuple[str, list[str]]]:
    """`folder` and everything below it, each file into the same place under share/."""
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        for path in sorted(Path(folder).rglob(pattern)):
            found.setdefault(f"{SHARE}/{path.parent.as_posix()}", []).append(path.as_posix())
    return sorted(found.items())


os.chdir(Path(__file__).resolve().parent)
distribution = setuptools.setup(
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (SHARE, ["package.xml"]),
        *shipped("launch", "*.launch.py", "*.rviz"),
        *shipped("config", "*.yaml", "*.xml", "*.sdf"),
    ],
)
# colcon prints the distribution and reads it back as a Python literal, which a SpecifierSet is not.
for holder in (distribution, distribution.metadata):
    holder.python_requires = str(holder.python_requires)
