"""Messages to vectors and back, over random and shipped descriptions, in two message libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from geometry_msgs.msg import Twist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rclpy.serialization import serialize_message
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64

from kuavo_smolvla_ros.robot.cdr import deserialize
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.messages import build
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec, spec_names
from kuavo_smolvla_ros.robot.vectors import (
    decode_action,
    decode_hold,
    decode_state,
    encode_action,
    encode_state,
)

TYPES = {
    "sensor_msgs/msg/JointState": JointState,
    "geometry_msgs/msg/Twist": Twist,
    "std_msgs/msg/Float64": Float64,
}
STANDARD = [n for n in spec_names() if not n.endswith("_bag")]
ROSBAGS = get_typestore(Stores.ROS2_JAZZY)


def messages_of(spec: RobotSpec, fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: build(TYPES[spec.streams[name].type], values) for name, values in fields.items()}


def as_rosbags(spec: RobotSpec, messages: dict[str, Any]) -> dict[str, Any]:
    """The same bytes, read by the other library."""
    return {n: deserialize(ROSBAGS, serialize_message(m), spec.streams[n].type) for n, m in messages.items()}


def random_values(spec: RobotSpec, names: tuple[str, ...], seed: int) -> np.ndarray:
    limits = spec.limits(names)
    return np.random.default_rng(seed).uniform(limits.lower, limits.upper)


@st.composite
def descriptions(draw: st.DrawFn) -> dict[str, Any]:
    """A random robot: joints in random units, split over streams read by name, by slice or by spread."""
    joints: dict[str, Any] = {}
    streams: dict[str, Any] = {}
    state: list[dict[str, Any]] = []
    action: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 4))):
        unit = draw(st.sampled_from(["rad", "fraction", "m"]))
        wire = draw(
            st.sampled_from({"rad": ["rad", "deg"], "fraction": ["percent", "byte"], "m": ["m", "mm"]}[unit])
        )
        custom = {
            "scale": draw(st.sampled_from([-3.0, 0.8, 1e-3, 250.0])),
            "offset": draw(st.floats(-10, 10)),
        }
        width = draw(st.integers(1, 5))
        names = [f"j{number}_{i}" for i in range(width)]
        for name in names:
            lower = draw(st.floats(-5, 4))
            joints[name] = {
                "group": f"g{number}", "unit": unit, "lower": lower, "upper": lower + draw(st.floats(0.1, 5)),
                "velocity": 1.0, "acceleration": 1.0,
            }  # fmt: skip
        for blocks, direction in ((state, "in"), (action, "out")):
            stream = f"{direction}{number}"
            streams[stream] = {
                "topic": f"/{stream}", "type": "sensor_msgs/msg/JointState", "direction": direction,
                "rate_hz": 10, "max_age_s": 1.0,
            }  # fmt: skip
            block: dict[str, Any] = {"joints": names, "stream": stream}
            block["unit"] = draw(st.sampled_from([wire, custom]))
            how = draw(st.sampled_from(["slice", "name", "spread"]))
            if how == "name":
                block |= {
                    "field": "position",
                    "names_field": "name",
                    "wire_names": [f"w_{n}" for n in reversed(names)],
                }
            elif how == "spread" and width == 1:
                block |= {
                    "field": "effort[0:3]",
                    "spread": draw(st.sampled_from([[7, "value", 1], ["value"] * 3])),
                }
            else:
                block |= {"field": f"position[0:{width}]"}
            blocks.append(block)
    order = draw(st.permutations(range(len(action))))
    return {
        "name": "random", "fps": 10, "command_rate_hz": 100, "max_skew_s": 0.05,
        "joints": joints, "streams": streams, "cameras": {},
        "state": state, "action": [action[i] for i in order],
    }  # fmt: skip


@given(description=descriptions(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_descriptions_round_trip(tmp_path: Path, description: dict[str, Any], seed: int) -> None:
    path = tmp_path / "random.yaml"
    path.write_text(yaml.safe_dump(description))
    spec = load_spec(path)
    action = random_values(spec, spec.action_names, seed)
    state = random_values(spec, spec.state_names, seed + 1)
    assert decode_action(spec, messages_of(spec, encode_action(spec, action))) == pytest.approx(
        action, abs=1e-9
    )
    assert decode_state(spec, messages_of(spec, encode_state(spec, state))) == pytest.approx(state, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in STANDARD if n != "kuavo_qiangnao"])
def test_shipped_descriptions_round_trip_in_both_message_libraries(name: str) -> None:
    spec = load_spec(name)
    for seed in range(20):
        held = random_values(spec, spec.hold_names, seed + 100)
        state = random_values(spec, spec.state_names, seed)
        messages = messages_of(spec, encode_state(spec, state, held))
        assert decode_state(spec, messages) == pytest.approx(state, abs=1e-12)
        assert (
            decode_state(spec, as_rosbags(spec, messages)).tolist() == decode_state(spec, messages).tolist()
        )
        assert decode_hold(spec, messages) == pytest.approx(held, abs=1e-12)


@pytest.mark.parametrize("name", [n for n in STANDARD if n != "kuavo_mobile"])
def test_shipped_commands_round_trip_in_both_message_libraries(name: str) -> None:
    spec = load_spec(name)
    action = random_values(spec, spec.action_names, 1)
    messages = messages_of(spec, encode_action(spec, action, random_values(spec, spec.hold_names, 2)))
    assert decode_action(spec, messages) == pytest.approx(action, abs=1e-12)
    assert decode_action(spec, as_rosbags(spec, messages)).tolist() == decode_action(spec, messages).tolist()


class TestSimulatedKuavo:
    spec = load_spec("kuavo_sim")

    def test_arms_are_commanded_in_degrees_left_then_right(self) -> None:
        action = np.zeros(16)
        action[0], action[8 + 3] = math.radians(30), math.radians(-90)
        fields = encode_action(self.spec, action)["arm_command"]
        assert fields["position"] == pytest.approx([30, 0, 0, 0, 0, 0, 0, 0, 0, 0, -90, 0, 0, 0])
        assert len(fields["name"]) == 14, "the controller counts the names"

    def test_grippers_are_commanded_as_bytes_by_name(self) -> None:
        action = np.zeros(16)
        action[7], action[15] = 1.0, 0.2
        fields = encode_action(self.spec, action)["gripper_command"]
        assert fields == {"name": ["left_gripper_joint", "right_gripper_joint"], "position": [255.0, 51.0]}

    def test_state_is_found_by_name_whatever_the_order(self) -> None:
        state = random_values(self.spec, self.spec.state_names, 0)
        messages = messages_of(self.spec, encode_state(self.spec, state))
        arm = messages["arm_state"]
        arm.name, arm.position = list(reversed(arm.name)), list(reversed(arm.position))
        assert decode_state(self.spec, messages) == pytest.approx(state, abs=1e-12)

    def test_extra_joints_in_the_message_do_not_matter(self) -> None:
        state = random_values(self.spec, self.spec.state_names, 0)
        messages = messages_of(self.spec, encode_state(self.spec, state))
        arm = messages["arm_state"]
        arm.name, arm.position = ["zhead_1_joint", *arm.name], [9.0, *arm.position]
        assert decode_state(self.spec, messages) == pytest.approx(state, abs=1e-12)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_non_finite_state_names_joint_and_stream(self, bad: float) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16)))
        messages["arm_state"].position[3] = bad
        with pytest.raises(MessageError, match=rf"stream 'arm_state': zarm_l4_joint is {bad}"):
            decode_state(self.spec, messages)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_non_finite_action_encodes_nothing(self, bad: float) -> None:
        action = np.zeros(16)
        action[15] = bad
        with pytest.raises(MessageError, match=rf"action: right_gripper is {bad}"):
            encode_action(self.spec, action)

    @pytest.mark.parametrize("shape", [(15,), (17,), (1, 16), ()])
    def test_wrong_width_encodes_nothing(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(MessageError, match=r"values for 16 joints"):
            encode_action(self.spec, np.zeros(shape))

    def test_missing_joint_is_named_and_what_is_there_listed(self) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16)))
        messages["gripper_state"] = build(JointState, {"name": ["left_gripper_joint"], "position": [0.0]})
        with pytest.raises(
            MessageError, match=r"'gripper_state': the joint 'right_gripper_joint' is missing.*names left"
        ):
            decode_state(self.spec, messages)

    def test_doubled_name_is_refused(self) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16)))
        messages["gripper_state"] = build(
            JointState, {"name": ["left_gripper_joint"] * 2, "position": [0.0, 1.0]}
        )
        with pytest.raises(MessageError, match=r"a name stands twice"):
            decode_state(self.spec, messages)

    def test_names_and_values_of_different_length_are_refused(self) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16)))
        messages["arm_state"].position.pop()
        with pytest.raises(MessageError, match=r"14 names in 'name' for 13 values in 'position'"):
            decode_state(self.spec, messages)

    def test_missing_stream_says_which_joints_it_would_have_given(self) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16)))
        del messages["gripper_state"]
        with pytest.raises(MessageError, match=r"stream 'gripper_state': no message, it holds left_gripper"):
            decode_state(self.spec, messages)

    def test_message_of_another_type_lists_its_fields(self) -> None:
        messages = messages_of(self.spec, encode_state(self.spec, np.zeros(16))) | {"arm_state": Twist()}
        with pytest.raises(MessageError, match=r"no field 'name' in the message; it holds linear, angular"):
            decode_state(self.spec, messages)


class TestOtherRobots:
    def test_hand_closes_with_the_thumb_opposed(self) -> None:
        spec = load_spec("kuavo_qiangnao")
        action = np.zeros(16)
        action[7] = 0.5
        fields = encode_action(spec, action)["gripper_command"]
        assert fields["position"] == [50.0, 100.0, 50.0, 50.0, 50.0, 50.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.0]

    def test_hand_state_reads_the_thumbs_and_cannot_be_made_up_from_them(self) -> None:
        spec = load_spec("kuavo_qiangnao")
        arm = messages_of(load_spec("kuavo"), encode_state(load_spec("kuavo"), np.zeros(16)))["arm_state"]
        hands = build(JointState, {"position": [50.0, *[100.0] * 5, 25.0, *[100.0] * 5]})
        state = decode_state(spec, {"arm_state": arm, "gripper_state": hands})
        assert (state[7], state[15]) == (0.5, 0.25)
        with pytest.raises(MessageError, match=r"'position\[1\]' belongs to no joint"):
            encode_state(spec, np.zeros(16))

    def test_claw_command_carries_speed_and_effort(self) -> None:
        fields = encode_action(load_spec("kuavo"), np.zeros(16))["gripper_command"]
        assert fields["velocity"] == [90.0, 90.0]
        assert fields["effort"] == [1.0, 1.0]

    def test_other_arm_keeps_its_measured_pose(self) -> None:
        spec = load_spec("kuavo_sim_left")
        held = random_values(spec, spec.hold_names, 5)
        fields = encode_action(spec, np.zeros(8), held)
        assert fields["arm_command"]["position"][7:] == pytest.approx(np.degrees(held[:7]).tolist())
        assert fields["gripper_command"]["position"][1] == pytest.approx(held[7] * 255)

    def test_one_armed_command_without_the_other_arms_pose_is_refused(self) -> None:
        with pytest.raises(MessageError, match=r"held: \(0,\) values for 8 joints"):
            encode_action(load_spec("kuavo_sim_left"), np.zeros(8))

    @pytest.mark.parametrize(
        ("flag", "sent"), [(0.0, {"arm_command"}), (0.5, {"arm_command"}), (1.0, {"base_command"})]
    )
    def test_flag_chooses_between_base_and_arms(self, flag: float, sent: set[str]) -> None:
        spec = load_spec("kuavo_mobile")
        action = np.zeros(20)
        action[16:] = [1.5, -0.5, 0.25, flag]
        fields = encode_action(spec, action)
        assert set(fields) - {"gripper_command"} == sent
        if flag > 0.5:
            assert fields["base_command"] == {"linear.x": 1.5, "linear.y": -0.5, "angular.z": 0.25}
            message = build(Twist, fields["base_command"])
            assert (message.linear.x, message.linear.y, message.angular.z) == (1.5, -0.5, 0.25)

    def test_recorded_whole_body_message_gives_the_arms(self) -> None:
        """The robot's own 28-joint message, as a plain object: no message package is needed to read it."""
        spec = load_spec("kuavo_sim_bag")

        class Holder:
            def __init__(self, **fields: Any) -> None:
                self.__dict__.update(fields)

        whole_body = Holder(joint_data=Holder(joint_q=np.arange(28) / 100))
        grippers = Holder(position=[0.4, 0.8])
        state = decode_state(spec, {"arm_state": whole_body, "gripper_state": grippers})
        assert state == pytest.approx([*np.arange(12, 19) / 100, 0.5, *np.arange(19, 26) / 100, 1.0])

    def test_too_short_an_array_says_how_far_it_had_to_reach(self) -> None:
        class Short:
            position = (0.4,)

        with pytest.raises(MessageError, match=r"position\[1:2\] reaches to value 2 but 'position' holds 1"):
            decode_state(load_spec("kuavo_sim_bag"), {"arm_state": _whole_body(), "gripper_state": Short()})


def _whole_body() -> Any:
    class Data:
        joint_q = tuple(0.0 for _ in range(28))

    class Message:
        joint_data = Data()

    return Message()
