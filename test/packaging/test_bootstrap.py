"""`make setup` decides what to install from what is there, does it once, and says what it cannot do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from kuavo_smolvla_ros.paths import share_dir

ROOT = share_dir()
VERSION = (sys.version_info[0], sys.version_info[1])


@pytest.fixture(scope="module")
def bootstrap() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "constraints").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'p'\n")
    for python in ("py310", "py311", "py312"):
        (tmp_path / "constraints" / f"{python}.txt").write_text("torch==2.10.0\ntorchvision==0.25.0\n")
    return tmp_path


class TestRosChoice:
    def test_wheels_where_nothing_is_sourced(self, bootstrap: types.ModuleType) -> None:
        assert bootstrap.choose_ros({}) == "wheels"
        assert bootstrap.choose_ros({"ROS_DISTRO": ""}) == "wheels"

    def test_a_sourced_ros_2_is_used(self, bootstrap: types.ModuleType) -> None:
        assert bootstrap.choose_ros({"ROS_DISTRO": "jazzy", "ROS_VERSION": "2"}) == "jazzy"

    def test_ros_1_is_refused(self, bootstrap: types.ModuleType) -> None:
        with pytest.raises(bootstrap.SetupError, match=r"ROS 1 \(noetic\)"):
            bootstrap.choose_ros({"ROS_DISTRO": "noetic", "ROS_VERSION": "1"})

    def test_its_own_rclpy_replaces_the_wheels(self, bootstrap: types.ModuleType) -> None:
        assert "ros" in bootstrap.choose_extras("", "wheels")
        assert bootstrap.choose_extras("", "jazzy") == ("bags", "view", "cluster", "sim", "train", "test")
        assert bootstrap.choose_extras("ros,bags", "jazzy") == ("bags",)

    def test_a_python_that_cannot_import_rclpy_is_named(
        self, bootstrap: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bare = tmp_path / "python3"
        bare.write_text("#!/bin/sh\nexit 1\n")
        bare.chmod(0o755)
        monkeypatch.setattr(bootstrap.sys, "executable", str(bare))
        with pytest.raises(bootstrap.SetupError, match=f"jazzy is sourced.*{bare}.*python3.12 for Jazzy"):
            bootstrap.create_venv(tmp_path / "venv", "jazzy", VERSION)
        assert not (tmp_path / "venv").exists()

    def test_the_environment_sees_the_systems_packages(
        self, bootstrap: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sourced ROS 2 puts rclpy on PYTHONPATH, and needs packages that apt installed."""
        (tmp_path / "ros" / "rclpy").mkdir(parents=True)
        (tmp_path / "ros" / "rclpy" / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ros"))
        commands: list[list[str]] = []
        monkeypatch.setattr(bootstrap, "call", lambda command: commands.append(list(command)))
        bootstrap.create_venv(tmp_path / "venv", "jazzy", VERSION)
        assert "--system-site-packages" in commands[0]
        bootstrap.create_venv(tmp_path / "venv", "wheels", VERSION)
        assert "--system-site-packages" not in commands[-1]

    def test_an_environment_is_not_mixed_with_another_ros(
        self, bootstrap: types.ModuleType, project: Path
    ) -> None:
        old = bootstrap.make_plan(project, VERSION, "wheels", "", "", None)
        with pytest.raises(bootstrap.SetupError, match=r"ROS from wheels.*ROS from jazzy"):
            bootstrap.make_plan(project, VERSION, "jazzy", "", "", old)


class TestExtras:
    def test_all_by_default(self, bootstrap: types.ModuleType) -> None:
        assert bootstrap.choose_extras("", "wheels") == bootstrap.EXTRAS

    def test_order_and_separator_do_not_matter(self, bootstrap: types.ModuleType) -> None:
        assert bootstrap.choose_extras("test ros", "wheels") == bootstrap.choose_extras("ros,test", "wheels")

    def test_an_unknown_one_is_named(self, bootstrap: types.ModuleType) -> None:
        with pytest.raises(bootstrap.SetupError, match="robots unknown; choose from"):
            bootstrap.choose_extras("ros,robots", "wheels")

    def test_they_are_those_of_pyproject(self, bootstrap: types.ModuleType) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
        names = {line.split("=")[0].strip() for line in table.splitlines() if " = [" in line}
        assert names - {"images"} == set(bootstrap.EXTRAS)  # images comes with each of the others


class TestPlan:
    def test_the_same_twice_is_the_same(self, bootstrap: types.ModuleType, project: Path) -> None:
        first = bootstrap.make_plan(project, VERSION, "wheels", "ros", "http://index", None)
        assert bootstrap.make_plan(project, VERSION, "wheels", "", "", first) == first

    @pytest.mark.parametrize("name", ["pyproject.toml", "plugin", "pins"])
    def test_a_changed_input_changes_it(self, bootstrap: types.ModuleType, project: Path, name: str) -> None:
        first = bootstrap.make_plan(project, VERSION, "wheels", "", "", None)
        paths = {
            "pyproject.toml": project / "pyproject.toml",
            "plugin": project / bootstrap.PLUGIN / "pyproject.toml",
            "pins": bootstrap.constraints_file(project, VERSION),
        }
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_text("changed==1\n")
        assert bootstrap.make_plan(project, VERSION, "wheels", "", "", first) != first

    def test_a_tools_setting_does_not(self, bootstrap: types.ModuleType, project: Path) -> None:
        first = bootstrap.make_plan(project, VERSION, "wheels", "", "", None)
        with (project / "pyproject.toml").open("a") as stream:
            stream.write("\n[tool.ruff]\nline-length = 100\n")
        assert bootstrap.make_plan(project, VERSION, "wheels", "", "", first) == first

    def test_the_address_of_an_index_is_not_stored(self, bootstrap: types.ModuleType, project: Path) -> None:
        plan = bootstrap.make_plan(project, VERSION, "wheels", "", "https://user:secret@host", None)
        assert "secret" not in repr(plan)

    @pytest.mark.parametrize("version", [(3, 9), (3, 13)])
    def test_an_unsupported_python_is_refused(
        self, bootstrap: types.ModuleType, version: tuple[int, int]
    ) -> None:
        with pytest.raises(bootstrap.SetupError, match=f"Python 3.{version[1]} is not supported"):
            bootstrap.constraints_file(ROOT, version)


class TestPipCommands:
    def commands(self, bootstrap: types.ModuleType, root: Path, extras: str, index: str) -> list[str]:
        plan = bootstrap.make_plan(root, VERSION, "wheels", extras, index, None)
        pins = bootstrap.constraints_file(root, VERSION)
        return [" ".join(c) for c in bootstrap.pip_commands(Path("py"), root, plan, pins, index)]

    def test_one_call_with_the_pins(self, bootstrap: types.ModuleType, project: Path) -> None:
        (command,) = self.commands(bootstrap, project, "ros,bags", "")
        assert command.endswith(f"-c {bootstrap.constraints_file(project, VERSION)} -e {project}[ros,bags]")

    def test_torch_first_from_another_index(self, bootstrap: types.ModuleType, project: Path) -> None:
        first, second = self.commands(bootstrap, project, "", "http://cpu")
        assert "--index-url http://cpu torch==2.10.0 torchvision==0.25.0" in first
        assert "--no-deps" in first
        assert "http://cpu" not in second

    def test_the_plugin_comes_with_training_only(self, bootstrap: types.ModuleType, project: Path) -> None:
        plugin = project / bootstrap.PLUGIN
        plugin.mkdir(parents=True)
        (plugin / "pyproject.toml").touch()
        assert self.commands(bootstrap, project, "train", "")[0].endswith(f"-e {plugin}")
        assert str(plugin) not in self.commands(bootstrap, project, "ros", "")[0]

    def test_an_unpinned_torch_is_an_error(self, bootstrap: types.ModuleType, project: Path) -> None:
        bootstrap.constraints_file(project, VERSION).write_text("numpy==2.2.6\n")
        with pytest.raises(bootstrap.SetupError, match="does not pin torch"):
            self.commands(bootstrap, project, "", "http://cpu")


class TestSystemNeeds:
    def need(self, bootstrap: types.ModuleType, present: bool) -> object:
        return bootstrap.SystemNeed("a thing", ("libthing1",), lambda: present)

    def test_nothing_happens_where_all_is_there(
        self, bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bootstrap, "call", lambda *_: pytest.fail("apt-get was called"))
        bootstrap.provide_system_needs([self.need(bootstrap, True)])

    def test_a_user_is_told_what_to_type(
        self, bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bootstrap.os, "geteuid", lambda: 1000)
        with pytest.raises(bootstrap.SetupError, match=r"lacks a thing.\n.*sudo apt-get install libthing1"):
            bootstrap.provide_system_needs([self.need(bootstrap, False)])

    def test_what_apt_did_not_bring_is_an_error(
        self, bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commands: list[list[str]] = []
        monkeypatch.setattr(bootstrap.os, "geteuid", lambda: 0)
        monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(bootstrap, "call", lambda command, _environ: commands.append(list(command)))
        with pytest.raises(bootstrap.SetupError, match="still lacks a thing"):
            bootstrap.provide_system_needs([self.need(bootstrap, False)])
        assert commands[-1][-1] == "libthing1"

    def test_each_use_brings_its_own(self, bootstrap: types.ModuleType) -> None:
        def packages(*extras: str) -> set[str]:
            needs = bootstrap.system_needs(extras, creating=False)
            return {package for need in needs for package in need.packages}

        assert packages("ros", "bags", "test") == set()
        assert {"libegl1", "libopengl0"} <= packages("sim")  # a window-less Debian has neither
        assert "gcc" in packages("train")


class TestEnvironment:
    def test_version_of_an_existing_one(self, bootstrap: types.ModuleType, tmp_path: Path) -> None:
        assert bootstrap.venv_version(tmp_path) is None
        (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
        assert bootstrap.venv_version(tmp_path) == (3, 12)
        (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\n")
        with pytest.raises(bootstrap.SetupError, match="names no version"):
            bootstrap.venv_version(tmp_path)

    def test_created_without_ensurepip(
        self, bootstrap: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Debian without python3-venv: the system's pip fills the environment."""
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            bootstrap.importlib.util,
            "find_spec",
            lambda name: None if name == "ensurepip" else find_spec(name),
        )
        commands: list[list[str]] = []
        monkeypatch.setattr(bootstrap, "call", lambda command: commands.append(list(command)))
        bootstrap.create_venv(tmp_path / "venv", "wheels", VERSION)
        assert commands[0][-1] == "--without-pip"
        assert commands[1][1:5] == ["-m", "pip", "--python", str(tmp_path / "venv" / "bin" / "python")]

    def test_a_second_setup_does_nothing(
        self, bootstrap: types.ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        venv = project / ".venv"
        commands: list[list[str]] = []

        def call(command: list[str], _environ: object = None) -> None:
            commands.append(list(command))
            if "venv" in command:
                venv.mkdir()
                (venv / "pyvenv.cfg").write_text(f"version = {VERSION[0]}.{VERSION[1]}.0\n")

        monkeypatch.setattr(bootstrap, "call", call)
        bootstrap.setup(project, venv, "ros", "", {})
        assert [c[-1] for c in commands[-2:]] == [f"{project}[ros]", "--disable-pip-version-check"]
        commands.clear()
        bootstrap.setup(project, venv, "", "", {})
        assert commands == []

    def test_a_failed_install_leaves_no_stamp(
        self, bootstrap: types.ModuleType, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        venv = project / ".venv"
        venv.mkdir()
        (venv / "pyvenv.cfg").write_text(f"version = {VERSION[0]}.{VERSION[1]}.0\n")

        def fail(command: list[str], _environ: object = None) -> None:
            raise bootstrap.SetupError("no network")

        monkeypatch.setattr(bootstrap, "call", fail)
        with pytest.raises(bootstrap.SetupError, match="no network"):
            bootstrap.setup(project, venv, "ros", "", {})
        assert bootstrap.read_stamp(venv) is None

    def test_another_environments_mark_is_not_passed_on(self, bootstrap: types.ModuleType) -> None:
        environ = {"_ROS_WHEELS_BOOTSTRAP_COMPLETE": "1", "HOME": "/root"}
        assert bootstrap.clean_environ(environ) == {"HOME": "/root"}


def test_a_failing_command_is_named(bootstrap: types.ModuleType) -> None:
    with pytest.raises(bootstrap.SetupError, match="status 3"):
        bootstrap.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_pins_are_names_and_versions_only() -> None:
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        lines = path.read_text().splitlines()
        assert len(lines) > 100
        for line in lines:
            name, _, version = line.partition("==")
            assert name.replace("-", "").replace(".", "").isalnum(), line
            assert version[0].isdigit(), line
            assert not set(version) & set("/:@ ;"), line


def test_this_environment_has_the_pinned_versions() -> None:
    """What the tests prove, they prove for the pins."""
    pins = ROOT / "constraints" / f"py{VERSION[0]}{VERSION[1]}.txt"
    wanted = dict(line.split("==") for line in pins.read_text().split())
    for name in ("lerobot", "torch", "transformers", "numpy", "mujoco", "rosbags", "pytest"):
        if importlib.util.find_spec(name) is None:
            continue
        assert importlib.metadata.version(name).partition("+")[0] == wanted[name]


def test_setup_answers_quickly_when_nothing_is_to_do(tmp_path: Path) -> None:
    """The whole program on an environment whose stamp fits, as every make target calls it."""
    environ = {"PATH": "/usr/bin:/bin"}
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import bootstrap, json, dataclasses; "
        f"plan = bootstrap.make_plan(bootstrap.ROOT, {VERSION}, 'wheels', '', '', None); "
        "print(json.dumps(dataclasses.asdict(plan)))"
    )
    stamp = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    (tmp_path / "pyvenv.cfg").write_text(f"version = {VERSION[0]}.{VERSION[1]}.0\n")
    (tmp_path / "kuavo_setup.json").write_text(stamp)
    command = [sys.executable, str(ROOT / "tools" / "bootstrap.py"), "--venv", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=20, check=True)
    assert done.stdout == done.stderr == ""
