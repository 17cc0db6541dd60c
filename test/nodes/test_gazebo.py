"""The Gazebo world and the bridge's topics: what is shipped is what the description gives, and it agrees.

No Gazebo runs here; where a tool that reads SDF is at hand (`gz sdf`, `ign sdf`), it has to accept the world.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import mujoco
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.nodes import gazebo_files
from kuavo_smolvla_ros.nodes.gazebo_mapping import CLOCK, GAZEBO_TYPES, WORLD, mapping
from kuavo_smolvla_ros.nodes.gazebo_world import FINGER_TRAVEL_M, HEAD_PITCH_RAD
from kuavo_smolvla_ros.nodes.message_types import message_class
from kuavo_smolvla_ros.robot.messages import build
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec
from kuavo_smolvla_ros.robot.vectors import decode_action, decode_state, encode_action, encode_state
from kuavo_smolvla_ros.sim.kuavo import STATE_NAMES
from kuavo_smolvla_ros.sim.model import add_robot, new_spec

Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def spec() -> RobotSpec:
    return load_spec(gazebo_files.ROBOT)


@pytest.fixture(scope="module")
def sdf() -> ElementTree.Element:
    return ElementTree.parse(gazebo_files.world_file()).getroot()


@pytest.fixture(scope="module")
def robot(sdf: ElementTree.Element) -> ElementTree.Element:
    (found,) = (m for m in sdf.iter("model") if m.get("name") == "kuavo")
    return found


def test_shipped_files_are_what_the_description_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert gazebo_files.main(["--check"]) == 0, capsys.readouterr().out


def test_a_file_that_was_changed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gazebo_files, "folder", lambda: tmp_path)
    assert gazebo_files.main(["--check"]) == 1
    assert gazebo_files.main([]) == 0
    assert gazebo_files.main(["--check"]) == 0
    gazebo_files.bridge_file().write_text("[]")
    assert gazebo_files.main(["--check"]) == 1
    assert "bridge.yaml: is not what the description gives" in capsys.readouterr().out


def test_checkpoints_of_the_simulator_fit() -> None:
    assert load_spec(gazebo_files.ROBOT).fingerprint == load_spec("kuavo_sim").fingerprint


class TestMapping:
    def test_every_stream_is_bridged_once_in_its_direction(self, spec: RobotSpec) -> None:
        entries = yaml.safe_load(gazebo_files.bridge_file().read_text())
        by_topic = {entry["ros_topic_name"]: entry for entry in entries}
        assert len(by_topic) == len(entries)
        assert set(by_topic) == {CLOCK, *(s.topic for s in spec.streams.values())}
        for stream in spec.streams.values():
            entry = by_topic[stream.topic]
            assert entry["ros_type_name"] == stream.type
            assert entry["gz_type_name"] == GAZEBO_TYPES[stream.type]
            assert entry["direction"] == {"in": "GZ_TO_ROS", "out": "ROS_TO_GZ"}[stream.direction]

    def test_keys_are_those_the_bridge_reads(self) -> None:
        for entry in yaml.safe_load(gazebo_files.bridge_file().read_text()):
            assert set(entry) == {
                "ros_topic_name", "gz_topic_name", "ros_type_name", "gz_type_name", "direction",
            }  # fmt: skip

    @pytest.mark.parametrize("robot", ["kuavo", "kuavo_sim", "kuavo_mobile"])
    def test_description_that_the_bridge_cannot_serve_is_refused(self, robot: str) -> None:
        with pytest.raises(UserError, match="ros_gz_bridge cannot take sensor_msgs/msg/"):
            mapping(load_spec(robot))

    @given(st.integers(0, 2**32 - 1))
    def test_values_survive_the_wire(self, seed: int) -> None:
        spec = load_spec(gazebo_files.ROBOT)
        limits = spec.limits(spec.action_names)
        values = np.random.default_rng(seed).uniform(limits.lower, limits.upper)
        out = {
            name: build(message_class(spec.streams[name].type), fields)
            for name, fields in encode_action(spec, values).items()
        }
        assert np.allclose(decode_action(spec, out), values, atol=1e-12)
        heard = {
            name: build(message_class(spec.streams[name].type), fields)
            for name, fields in encode_state(spec, values).items()
        }
        assert np.allclose(decode_state(spec, heard), values, atol=1e-12)


class TestWorld:
    def test_every_bridged_topic_of_the_world_has_its_end_there(
        self, spec: RobotSpec, sdf: ElementTree.Element
    ) -> None:
        topics = Counter(node.text for node in sdf.iter("topic"))
        assert set(topics.values()) == {1}
        given_by_gazebo = {f"/world/{WORLD}/clock", f"/world/{WORLD}/model/kuavo/joint_state"}
        assert set(topics) == {entry.gz_topic_name for entry in mapping(spec)} - given_by_gazebo
        (world,) = sdf.iter("world")
        assert world.get("name") == WORLD

    def test_each_command_drives_the_joint_it_is_for(
        self, spec: RobotSpec, robot: ElementTree.Element
    ) -> None:
        driven = {
            plugin.findtext("topic"): [node.text for node in plugin.iter("joint_name")]
            for plugin in robot.iter("plugin")
            if "position-controller" in str(plugin.get("filename"))
        }
        for block in spec.action:
            (name,) = block.joints
            side = name.removesuffix("_gripper")
            wanted = [name] if name.startswith("zarm") else [f"{side}_finger_a", f"{side}_finger_b"]
            assert driven.pop(spec.streams[block.stream].topic) == wanted
        assert not driven

    def test_every_measured_joint_is_told(self, spec: RobotSpec, robot: ElementTree.Element) -> None:
        (plugin,) = (p for p in robot.iter("plugin") if "state-publisher" in str(p.get("filename")))
        told = {node.text for node in plugin.iter("joint_name")}
        assert {name for block in spec.state for name in block.wire_names} <= told

    def test_limits_are_those_of_the_description(self, spec: RobotSpec, robot: ElementTree.Element) -> None:
        joints = {j.get("name"): j for j in robot.iter("joint")}
        for name in spec.action_names:
            limit = joints[name.replace("gripper", "finger_a")].find("axis/limit")
            assert limit is not None
            low, high, speed = (float(limit.findtext(k, "")) for k in ("lower", "upper", "velocity"))
            if name.endswith("gripper"):
                assert (low, high) == (0.0, FINGER_TRAVEL_M)
                assert {b.unit.scale for b in (*spec.state, *spec.action) if b.joints == (name,)} == {high}
                continue
            described = spec.joints[name]
            assert (low, high, speed) == (described.lower, described.upper, described.velocity)

    def test_cameras_give_the_described_pictures(self, spec: RobotSpec, robot: ElementTree.Element) -> None:
        sensors = {s.get("name"): s for s in robot.iter("sensor")}
        assert set(sensors) == set(spec.cameras)
        for role, camera in spec.cameras.items():
            sensor, stream = sensors[role], spec.streams[camera.stream]
            assert sensor.findtext("topic") == stream.topic
            assert float(sensor.findtext("update_rate", "")) == stream.rate_hz
            size = [int(sensor.findtext(f"camera/image/{k}", "")) for k in ("width", "height")]
            assert size == [camera.width, camera.height]

    def test_steps_are_as_long_as_the_joint_states_are_apart(
        self, spec: RobotSpec, sdf: ElementTree.Element
    ) -> None:
        """Gazebo tells the joints after each step."""
        step_s = float(sdf.findtext("world/physics/max_step_size", ""))
        assert 1 / step_s == spec.streams["arm_state"].rate_hz

    def test_robot_is_the_one_of_the_other_simulator(self, robot: ElementTree.Element) -> None:
        """Links, cameras and masses against the MuJoCo model, in random poses."""
        rng = np.random.default_rng(1)
        spec = new_spec()
        add_robot(spec, mobile=False, head_pitch_rad=HEAD_PITCH_RAD)
        model = spec.compile()
        data = mujoco.MjData(model)
        for _ in range(5):
            angles = {}
            for name in STATE_NAMES:
                if name.endswith("gripper"):
                    continue
                joint = model.joint(name)
                angles[name] = rng.uniform(*joint.range)
                data.qpos[joint.qposadr[0]] = angles[name]
            for side in ("left", "right"):
                closed = rng.uniform(0, FINGER_TRAVEL_M)
                for finger in (f"{side}_finger_a", f"{side}_finger_b"):
                    angles[finger] = closed
                    data.qpos[model.joint(finger).qposadr[0]] = FINGER_TRAVEL_M - closed
            mujoco.mj_kinematics(model, data)
            mujoco.mj_camlight(model, data)
            places = link_places(robot, angles)
            for name in (*(f"zarm_{s}{n}_link" for s in "lr" for n in range(1, 8)), "head"):
                body = data.body(name)
                assert np.allclose(places[name][:3, 3], body.xpos, atol=1e-6), name
                assert np.allclose(places[name][:3, :3], body.xmat.reshape(3, 3), atol=1e-6), name
                if name.startswith("zarm"):
                    assert mass(robot, name) == pytest.approx(float(model.body(name).mass[0]))
            for finger in ("left_finger_a", "left_finger_b", "right_finger_a", "right_finger_b"):
                assert np.allclose(places[f"{finger}_link"][:3, 3], data.body(finger).xpos, atol=1e-6), finger
            for role, (place, fov) in cameras(robot, places).items():
                camera = data.camera(role)
                assert np.allclose(place[:3, 3], camera.xpos, atol=1e-6), role
                seen = camera.xmat.reshape(3, 3)  # looks along -z with y up, there along x with z up
                assert np.allclose(place[:3, 0], -seen[:, 2], atol=1e-5), role
                assert np.allclose(place[:3, 2], seen[:, 1], atol=1e-5), role
                upright = 2 * np.arctan(np.tan(fov / 2) * 480 / 640)
                assert np.degrees(upright) == pytest.approx(float(model.camera(role).fovy[0]))


def link_places(robot: ElementTree.Element, angles: dict[str, float]) -> dict[str, Matrix]:
    """Where each link is, by the poses in the file alone."""
    places = {"world": np.eye(4), "base": pose(robot.find("pose"))}
    todo = [j for j in robot.iter("joint") if j.get("name") != "standing"]
    while todo:
        joint = next(j for j in todo if j.findtext("parent") in places)
        todo.remove(joint)
        offset = joint.find("pose")
        assert offset is not None
        assert offset.get("relative_to") == joint.findtext("parent")
        child = str(joint.findtext("child"))
        (link,) = (node for node in robot.iter("link") if node.get("name") == child)
        own = link.find("pose")
        assert own is not None
        assert own.get("relative_to") == joint.get("name")
        places[child] = places[str(joint.findtext("parent"))] @ pose(offset) @ motion(joint, angles)
    return places


def motion(joint: ElementTree.Element, angles: dict[str, float]) -> Matrix:
    moved = np.eye(4)
    if joint.get("type") == "fixed":
        return moved
    axis = np.array([float(x) for x in joint.findtext("axis/xyz", "").split()])
    value = angles[str(joint.get("name"))]
    if joint.get("type") == "prismatic":
        moved[:3, 3] = axis * value
    else:
        quat = np.zeros(4)
        mujoco.mju_axisAngle2Quat(quat, axis, value)
        flat = np.zeros(9)
        mujoco.mju_quat2Mat(flat, quat)
        moved[:3, :3] = flat.reshape(3, 3)
    return moved


def pose(node: ElementTree.Element | None) -> Matrix:
    assert node is not None
    x, y, z, roll, pitch, yaw = (float(v) for v in str(node.text).split())
    quat = np.zeros(4)
    mujoco.mju_euler2Quat(quat, np.array([roll, pitch, yaw]), "XYZ")  # about fixed axes
    flat = np.zeros(9)
    mujoco.mju_quat2Mat(flat, quat)
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = flat.reshape(3, 3), (x, y, z)
    return place


def mass(robot: ElementTree.Element, name: str) -> float:
    (link,) = (node for node in robot.iter("link") if node.get("name") == name)
    return float(link.findtext("inertial/mass", ""))


def cameras(robot: ElementTree.Element, places: dict[str, Matrix]) -> dict[str, tuple[Matrix, float]]:
    found = {}
    for link in robot.iter("link"):
        for sensor in link.iter("sensor"):
            fov = float(sensor.findtext("camera/horizontal_fov", ""))
            place = places[str(link.get("name"))] @ pose(sensor.find("pose"))
            found[str(sensor.get("name"))] = (place, fov)
    return found


def sdf_tool() -> list[str]:
    for program in ("gz", "ign"):
        if shutil.which(program) is not None:
            probe = subprocess.run([program, "sdf", "--versions"], capture_output=True, text=True, timeout=60)
            if probe.returncode == 0 and probe.stdout.strip():
                return [program, "sdf"]
    pytest.skip("no SDF tool here: neither `gz sdf` nor `ign sdf` (Debian: ignition-tools libsdformat-dev)")


def test_sdf_tool_accepts_the_world() -> None:
    command = [*sdf_tool(), "--check", str(gazebo_files.world_file())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Valid." in done.stdout
    assert "Warning" not in done.stdout + done.stderr, "every element is one the format knows"


def test_sdf_tool_sees_a_wrong_world(tmp_path: Path) -> None:
    """The check above is worth something: a joint without its link is refused."""
    broken = tmp_path / "broken.sdf"
    text = gazebo_files.world_file().read_text()
    broken.write_text(text.replace("<child>head</child>", "<child>nose</child>"))
    done = subprocess.run([*sdf_tool(), "--check", str(broken)], capture_output=True, text=True, timeout=60)
    assert "Error" in done.stdout + done.stderr
    assert "Valid." not in done.stdout
