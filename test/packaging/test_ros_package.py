"""Built by colcon, everything is where `ros2 run` and `ros2 launch` look, and it runs from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from kuavo_smolvla_ros.paths import PACKAGE, share_dir

pytest.importorskip("colcon_ros")

ROOT = share_dir()
BUILT_FROM = ("pyproject.toml", "setup.py", "setup.cfg", "package.xml", "README.md", "LICENSE")
FOLDERS = (PACKAGE, "resource", "config", "launch")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`install/kuavo_smolvla_ros` after `colcon build` of a workspace with a copy of this package."""
    workspace = tmp_path_factory.mktemp("workspace")
    source = workspace / "src" / PACKAGE
    source.mkdir(parents=True)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "launch").mkdir(exist_ok=True)
    (source / "launch" / "probe.launch.py").write_text("# installed by the test\n")
    environ = {**os.environ, "COLCON_LOG_PATH": str(workspace / "log")}
    command = [sys.executable, "-m", "colcon", "build", "--event-handlers", "console_direct+"]
    done = subprocess.run(command, cwd=workspace, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace / "install" / PACKAGE


def site_packages(prefix: Path) -> Path:
    (found,) = prefix.glob("lib/python3.*/site-packages")
    return found


def scripts() -> dict[str, str]:
    table = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1].split("\n[")[0]
    lines = [line.split("=") for line in table.splitlines() if "=" in line]
    return {name.strip().strip('"'): target.strip().strip('"') for name, target in lines}


def test_the_index_names_the_package(prefix: Path) -> None:
    assert (prefix / "share" / "ament_index" / "resource_index" / "packages" / PACKAGE).is_file()
    assert (prefix / "share" / PACKAGE / "package.xml").is_file()


def test_ament_index_finds_it(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look-up that `ros2 run` and launch files use."""
    packages = pytest.importorskip("ament_index_python.packages")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(prefix))
    assert Path(packages.get_package_prefix(PACKAGE)) == prefix
    assert Path(packages.get_package_share_directory(PACKAGE)) == prefix / "share" / PACKAGE


def test_every_configuration_file_is_installed(prefix: Path) -> None:
    share = prefix / "share" / PACKAGE
    shipped = (".yaml", ".xml", ".sdf")
    wanted = {p.relative_to(ROOT) for p in (ROOT / "config").rglob("*") if p.suffix in shipped}
    installed = {p.relative_to(share) for p in (share / "config").rglob("*") if p.is_file()}
    assert installed == wanted
    assert len(wanted) > 3


def test_launch_files_are_where_ros2_launch_looks(prefix: Path) -> None:
    launch = prefix / "share" / PACKAGE / "launch"
    wanted = {p.name for p in (ROOT / "launch").glob("*.launch.py")} | {"probe.launch.py"}
    assert {p.name for p in launch.iterdir()} == wanted


def test_executables_are_where_ros2_run_looks(prefix: Path) -> None:
    folder = prefix / "lib" / PACKAGE
    assert {p.name for p in folder.iterdir()} == set(scripts())
    for path in folder.iterdir():
        assert os.access(path, os.X_OK)


def test_executables_run_the_active_environments_python(prefix: Path) -> None:
    """Not the one that ran colcon: that is the system's, which has no torch."""
    for path in (prefix / "lib" / PACKAGE).iterdir():
        assert path.read_text().splitlines()[0] == "#!/usr/bin/env python3"


def test_an_executable_runs_from_the_prefix(prefix: Path, tmp_path: Path) -> None:
    environ = {
        **os.environ,
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site_packages(prefix)),
    }
    command = [prefix / "lib" / PACKAGE / "kuavo-smolvla", "check", "kuavo_sim"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "fingerprint" in done.stdout


def test_the_installed_package_reads_its_own_configuration(prefix: Path, tmp_path: Path) -> None:
    program = "from kuavo_smolvla_ros import paths; print(paths.__file__); print(paths.config_dir())"
    environ = {**os.environ, "PYTHONPATH": str(site_packages(prefix))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    module, config = done.stdout.split()
    assert Path(module).is_relative_to(prefix)
    assert Path(config) == prefix / "share" / PACKAGE / "config"


def test_every_file_of_the_package_is_installed(prefix: Path) -> None:
    """Model files beside the code are forgotten easily: a checkout works, an installation does not."""
    source = ROOT / PACKAGE
    wanted = {
        p.relative_to(source) for p in source.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    package = site_packages(prefix) / PACKAGE
    installed = {p.relative_to(package) for p in package.rglob("*") if p.is_file()}
    assert wanted - installed == set()


def test_entry_points_exist() -> None:
    for target in scripts().values():
        module, _, function = target.partition(":")
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        assert f"def {function}(" in path.read_text(), target


class TestManifest:
    @pytest.fixture
    def manifest(self) -> ElementTree.Element:
        return ElementTree.parse(ROOT / "package.xml").getroot()

    def test_catkin_pkg_accepts_it(self) -> None:
        package = pytest.importorskip("catkin_pkg.package").parse_package(str(ROOT))
        assert package.name == PACKAGE
        assert package.package_format == 3
        assert package.get_build_type() == "ament_python"
        assert (package.licenses[0], package.licenses[0].file) == ("Apache-2.0", "LICENSE")

    def test_its_version_is_the_packages(self, manifest: ElementTree.Element) -> None:
        from kuavo_smolvla_ros import __version__

        assert manifest.findtext("version") == __version__
        assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()

    def test_every_message_package_that_is_used_is_declared(self, manifest: ElementTree.Element) -> None:
        declared = {element.text for element in manifest.iter("exec_depend")}
        used = set()
        for path in (ROOT / PACKAGE).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if len(words) > 1 and words[0] in ("import", "from"):
                    name = words[1].split(".")[0]
                    if name.endswith(("_msgs", "_srvs", "_interfaces")) or name in ("rclpy", "launch"):
                        used.add(name)
        assert used - {"builtin_interfaces", "rcl_interfaces", *declared} == set()
