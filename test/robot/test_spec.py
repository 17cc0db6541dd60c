# ruff: noqa: E501  (the table of bad descriptions reads in rows)
"""Robot descriptions: what is shipped holds together, and what is wrong is named with file, line and key."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.robot.description import fingerprint, identity_difference
from kuavo_smolvla_ros.robot.spec import SpecError, load_spec, spec_names

BOTH_ARMS = (
    *(f"zarm_l{i}_joint" for i in range(1, 8)),
    "left_gripper",
    *(f"zarm_r{i}_joint" for i in range(1, 8)),
    "right_gripper",
)


@pytest.fixture
def robot_dir(tmp_path: Path) -> Path:
    """A copy of the shipped descriptions that a test may damage."""
    return Path(shutil.copytree(config_dir() / "robot", tmp_path / "robot"))


def edit(robot_dir: Path, name: str, old: str, new: str) -> Path:
    path = robot_dir / f"{name}.yaml"
    text = path.read_text()
    assert old in text, f"the test's own edit does not apply: {old!r}"
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize("name", spec_names())
def test_shipped_description_loads(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    limits = spec.limits(spec.action_names)
    assert np.all(limits.lower < limits.upper)
    assert np.all(np.abs(limits.lower[[n.startswith("zarm") for n in limits.names]]) < 3.1416)


def test_two_arms_are_sixteen_wide_in_the_documented_order() -> None:
    for name in ("kuavo_sim", "kuavo", "kuavo_qiangnao"):
        spec = load_spec(name)
        assert spec.state_names == spec.action_names == BOTH_ARMS
        assert list(spec.cameras) == ["head_cam_h", "wrist_cam_l", "wrist_cam_r"]


def test_mobile_action_is_twenty_wide_and_its_state_sixteen() -> None:
    spec = load_spec("kuavo_mobile")
    assert spec.state_names == BOTH_ARMS
    assert spec.action_names == (*BOTH_ARMS, "base_x", "base_y", "base_yaw", "base_move")


@pytest.mark.parametrize(
    ("name", "moves", "keeps"), [("kuavo_sim_left", "l", "r"), ("kuavo_sim_right", "r", "l")]
)
def test_one_armed_description_holds_the_other_arm(name: str, moves: str, keeps: str) -> None:
    spec = load_spec(name)
    assert len(spec.action_names) == 8
    assert spec.action_names[0] == f"zarm_{moves}1_joint"
    assert len(spec.hold_names) == 8
    assert spec.hold_names[0] == f"zarm_{keeps}1_joint"
    assert len(spec.cameras) == 2


def test_velocity_is_the_smaller_of_model_and_motor() -> None:
    hardware = load_spec("kuavo_sim", limit_profile="hardware")
    arm = hardware.limits(hardware.group("left_arm"))
    assert arm.velocity.tolist() == [10.0, 8.0, 7.5, 8.0, 7.0, 7.0, 7.0]


def test_profiles_only_ever_lower_limits() -> None:
    hardware = load_spec("kuavo_sim", limit_profile="hardware").limits(BOTH_ARMS)
    default = load_spec("kuavo_sim").limits(BOTH_ARMS)
    first_run = load_spec("kuavo_sim", limit_profile="first_run").limits(BOTH_ARMS)
    for slow, fast in ((default, hardware), (first_run, default)):
        assert np.all(slow.velocity <= fast.velocity)
        assert np.all(slow.acceleration <= fast.acceleration)
        assert slow.lower.tolist() == fast.lower.tolist()
    assert first_run.velocity[0] < default.velocity[0] < hardware.velocity[0]


def test_default_limits_bring_an_arm_to_rest_within_half_a_second() -> None:
    spec = load_spec("kuavo_sim")
    limits = spec.limits(spec.group("left_arm") + spec.group("right_arm"))
    assert np.max(limits.velocity / limits.acceleration) < 0.5


def test_unknown_profile_lists_those_there_are() -> None:
    with pytest.raises(SpecError, match=r"'fast' is unknown; choose one of hardware, default, first_run"):
        load_spec("kuavo_sim", limit_profile="fast")


def test_unknown_name_lists_what_is_shipped() -> None:
    with pytest.raises(SpecError, match=r"no robot description 'kuavoo'; shipped are kuavo, .*kuavo_sim"):
        load_spec("kuavoo")


def test_poses_are_in_radians_within_limits() -> None:
    spec = load_spec("kuavo_sim")
    assert set(spec.poses) >= {"zero", "task1_ready", "task2_ready", "task3_ready", "task4_ready"}
    assert spec.poses["task1_ready"]["zarm_l4_joint"] == pytest.approx(math.radians(-95))
    for pose in spec.poses.values():
        for name, value in pose.items():
            assert spec.joints[name].lower <= value <= spec.joints[name].upper


class TestFingerprint:
    def test_wire_form_does_not_matter(self) -> None:
        """A recording of the robot's own messages fits the live robot behind a bridge."""
        assert load_spec("kuavo_sim").fingerprint == load_spec("kuavo_sim_bag").fingerprint
        assert load_spec("kuavo").fingerprint == load_spec("kuavo_bag").fingerprint

    def test_limits_do_not_matter(self) -> None:
        assert load_spec("kuavo_sim").fingerprint == load_spec("kuavo_sim", "first_run").fingerprint

    def test_it_is_stable_across_releases(self) -> None:
        """Every dataset and checkpoint carries this value: whoever changes it makes all of them foreign."""
        assert load_spec("kuavo_sim").fingerprint == "ac8b0a3d55f64b1b"
        assert load_spec("kuavo_mobile").fingerprint == "e9a691176626ba61"

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"fps": 20.0}, "the rate is 10 fps here and 20 fps there"),
            (
                {"cameras": ["head_cam_h"]},
                "cameras are head_cam_h, wrist_cam_l, wrist_cam_r here and head_cam_h there",
            ),
        ],
    )
    def test_difference_is_said_in_a_sentence(self, change: dict[str, object], sentence: str) -> None:
        ours = load_spec("kuavo_sim").identity
        theirs = {**ours, **change}
        assert fingerprint(ours) != fingerprint(theirs)
        assert identity_difference(ours, theirs) == sentence

    def test_swapped_joints_are_named(self) -> None:
        ours = load_spec("kuavo_sim").identity
        state = list(ours["state"])
        state[0], state[1] = state[1], state[0]
        sentence = identity_difference(ours, {**ours, "state": state})
        assert sentence == "state[0] is zarm_l1_joint in rad here and zarm_l2_joint in rad there"

    def test_different_width_names_the_extra_joints(self) -> None:
        sentence = identity_difference(load_spec("kuavo_sim").identity, load_spec("kuavo_mobile").identity)
        assert (
            sentence
            == "action is 16 wide here and 20 there (not in both: base_move, base_x, base_y, base_yaw)"
        )

    def test_same_is_no_difference(self) -> None:
        assert identity_difference(load_spec("kuavo_sim").identity, load_spec("kuavo").identity) is None


BAD = [
    # file, old text, new text, what the message must say
    ("kuavo_sim", "name: kuavo_sim", "name: kuavo_sim\nframes: 3", r"kuavo_sim\.yaml:\d+: frames: unknown key"),
    ("kuavo_sim", "name: kuavo_sim", "nam: kuavo_sim", r"the key 'name' is missing"),
    ("kuavo_sim", "name: kuavo_sim", "name: a\nname: b", r"kuavo_sim\.yaml:6: the key 'name' stands twice"),
    ("_kuavo_v45", "fps: 10", "fps: 0", r"_kuavo_v45\.yaml:\d+: fps: 0 must be above 0"),
    ("_kuavo_v45", "fps: 10", "fps: .nan", r"fps: nan is not a finite number"),
    ("_kuavo_v45", "fps: 10", "fps: ten", r"fps: 'ten' is not a number"),
    ("_kuavo_v45", "fps: 10", "fps: true", r"fps: True is not a number"),
    ("_kuavo_v45", "max_skew_s: 0.05", "max_skew_s: -1", r"max_skew_s: -1 must be above 0"),
    ("_kuavo_v45", "lower: -0.349, upper: 2.094", "lower: 2.2, upper: 2.094", r"zarm_l2_joint\.lower: 2\.2 is not below"),
    ("_kuavo_v45", "unit: rad, lower: -3.14159", "unit: turns, lower: -3.14159", r"'turns' is unknown; choose one of rad"),
    ("_kuavo_v45", "[-10, 15, 25, -95, -90, 25, -20]", "[-10, 15, 25, -95, -180, 25, -20]", r"zarm_l5_joint = -3\.14.*outside"),
    ("_kuavo_v45", "[-10, 15, 25, -95, -90, 25, -20]", "[-10, 15]", r"task1_ready\.left_arm: 2 values for 7 joints"),
    ("_kuavo_v45", "left_arm: {velocity: 2.5", "left_leg: {velocity: 2.5", r"default: there is no group 'left_leg'"),
    ("_kuavo_v45", "limit_profile: default", "limit_profile: fast", r"limit_profile: 'fast' is unknown"),
    ("_kuavo_v45", "velocity: 10.0,", "velocity: 0,", r"velocity: 0 must be above 0"),
    ("kuavo_sim", "{scale: 0.8}", "{scale: 0}", r"unit\.scale: 0 cannot be inverted"),
    ("kuavo_sim", "{scale: 0.8}", "{scale: 0.8, shift: 1}", r"shift: unknown key"),
    ("kuavo_sim", "unit: byte", "unit: bytes", r"action\[1\]\.unit: the unit 'bytes' is unknown; known are rad, deg"),
    ("kuavo_sim", "unit: byte", "unit: deg", r"'deg' translates to rad, the joints are in fraction"),
    ("kuavo_sim", "type: sensor_msgs/msg/CompressedImage", "type: sensor_msgs/CompressedImage", r"must look like"),
    ("kuavo_sim", "topic: /gripper/state", "topic: gripper/state", r"must be absolute"),
    ("kuavo_sim", "topic: /gripper/state", "topic: /kuavo/arm_state", r"the topic /kuavo/arm_state stands in two streams"),
    ("kuavo_sim", "topic: /gripper/state", "topic: /kuavo/stop_state", r"the topic /kuavo/stop_state is .*Bool here and .*JointState"),
    ("kuavo_sim", "stream: head_image, height", "stream: nose_image, height", r"head_cam_h: 'nose_image' is no incoming stream"),
    ("kuavo_sim", "stream: head_image, height", "stream: arm_state, height", r"JointState carries no picture"),
    ("kuavo_sim", "stream: head_image, height", "stream: left_image, height", r"wrist_cam_l and head_cam_h share the stream"),
    ("kuavo_sim", "height: 480", "height: 480.5", r"480\.5 is not a whole number"),
    ("kuavo_sim", "height: 480", "height: 0", r"0 must be above 0"),
    ("kuavo_sim", "max_age_s: 0.25", "max_age_s: .inf", r"max_age_s: inf is not a finite number"),
    ("kuavo_sim", '"position[0:7]"', '"position[0:6]"', r"'position\[0:6\]' is 6 wide, the joints need 7"),
    ("kuavo_sim", '"position[0:7]"', '"position[7:0]"', r"the slice is empty"),
    ("kuavo_sim", '"position[0:7]"', '"position[a]"', r"is not a field path"),
    ("kuavo_sim", '"position[0:7]"', "position", r"needs a slice of 7 values, for example position\[0:7\]"),
    ("kuavo_sim", '"position[7:14]"', '"position[6:13]"', r"arm_command\.position\[6\] is written by two blocks"),
    ("kuavo_sim", '"position[7:14]"', '"position[8:15]"', r"arm_command\.position\[7\] is written by no block"),
    ("kuavo_sim", "- {joints: left_arm, stream: arm_state", "- {joints: left_leg, stream: arm_state", r"no group 'left_leg'"),
    ("kuavo_sim", "joints: [left_gripper], stream: gripper_state", "joints: [left_claw], stream: gripper_state", r"'left_claw' is not under"),
    ("kuavo_sim", "joints: [left_gripper], stream: gripper_state", "joints: [right_gripper], stream: gripper_state", r"'right_gripper' stands twice"),
    ("kuavo_sim", "stream: arm_state, field: position, names_field: name}", "stream: arm_command, field: position, names_field: name}", r"goes out, state needs one that goes in"),
    ("kuavo_sim", "stream: arm_state, field: position, names_field: name}", "stream: arms, field: position, names_field: name}", r"'arms' is not under 'streams'"),
    ("kuavo_sim", "wire_names: [left_gripper_joint], unit: byte", "wire_names: [right_gripper_joint], unit: byte", r"'right_gripper_joint' is written twice"),
    ("kuavo_mobile", "above: 0.5}}", "above: 0.5, at_most: 0.5}}", r"exactly one of 'above' and 'at_most'"),
    ("kuavo_mobile", "joint: base_move, above", "joint: base_go, above", r"'base_go' is no action"),
    ("kuavo_mobile", "stream: arm_command, longer", "stream: arm_state, longer", r"'arm_state' is no outgoing stream"),
    ("kuavo_sim_left", "joints: [right_gripper], stream: gripper_state", "joints: [left_gripper], stream: gripper_state", r"state and action must name the same joints"),
    ("kuavo_qiangnao", "[value, 100, value, value, value, value]", "[value, 100]", r"'position\[0:6\]' is 6 wide, the joints need 2"),
    ("kuavo_qiangnao", "[value, 100, value, value, value, value]", "[0, 100, 0, 0, 0, 0]", r"the word 'value', at least once"),
    ("kuavo", "equals: 2", "equals: [2]", r"equals: \[2\] is neither a number nor text"),
    ("kuavo", "extends: _kuavo_v45.yaml", "extends: kuavo.yaml", r"runs in a circle"),
    ("kuavo", "extends: _kuavo_v45.yaml", "extends: nothing.yaml", r"nothing\.yaml: cannot be read"),
    ("kuavo", "cameras:", "cameras: [", r"kuavo\.yaml: not valid YAML"),
    ("kuavo", "name: kuavo", "name: !!python/object/apply:os.system ['true']", r"not valid YAML: could not determine a constructor"),
    ("kuavo", "name: kuavo", "name: kuavo\n3: x", r"the key 3 is not text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new", "says"), BAD)
def test_bad_description_is_refused_by_name(
    robot_dir: Path, name: str, old: str, new: str, says: str
) -> None:
    path = edit(robot_dir, name, old, new)
    loaded = path if name != "_kuavo_v45" else robot_dir / "kuavo_sim.yaml"
    with pytest.raises(SpecError, match=says) as caught:
        load_spec(loaded)
    assert ".yaml" in str(caught.value), "the message names the file"


def test_message_names_the_line_of_the_file_that_holds_the_key(robot_dir: Path) -> None:
    """A fault in the extended file is reported there, not in the file that extends it."""
    path = edit(robot_dir, "_kuavo_v45", "max_skew_s: 0.05", "max_skew_s: soon")
    line = 1 + path.read_text().splitlines().index("max_skew_s: soon")
    with pytest.raises(SpecError, match=rf"^_kuavo_v45\.yaml:{line}: max_skew_s"):
        load_spec(robot_dir / "kuavo_sim.yaml")


def test_null_removes_an_inherited_key(robot_dir: Path) -> None:
    path = edit(
        robot_dir, "kuavo_sim", "name: kuavo_sim", "name: kuavo_sim\nlimit_profiles: ~\nlimit_profile: ~"
    )
    assert load_spec(path).limit_profile == "hardware"


def test_description_is_immutable() -> None:
    spec = load_spec("kuavo_sim")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.fps = 30.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.joints["zarm_l1_joint"] = None  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        spec.limits(["zarm_l1_joint"]).lower[0] = -9.0


def test_every_shipped_file_is_plain_safe_yaml() -> None:
    for path in (config_dir() / "robot").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_a_description_of_ones_own_extends_a_shipped_one_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: kuavo_sim.yaml\nname: own\n")
    assert load_spec(own).fingerprint == load_spec("kuavo_sim").fingerprint
    (tmp_path / "kuavo_sim.yaml").write_text("extends: kuavo_mobile.yaml\n")  # the one beside it comes first
    assert load_spec(own).fingerprint == load_spec("kuavo_mobile").fingerprint
