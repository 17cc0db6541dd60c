"""The model against the published numbers of the robot."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.command import action_limits, action_names, velocity_limits
from kuavo_smolvla_ros.sim.model import add_robot, new_spec

HEAD_PITCH = np.deg2rad(12.0)


@pytest.fixture(scope="module")
def robot() -> tuple[mujoco.MjModel, mujoco.MjData]:
    spec = new_spec()
    add_robot(spec, mobile=False, head_pitch_rad=HEAD_PITCH)
    model = spec.compile()
    return model, mujoco.MjData(model)


def pinch(robot: tuple[mujoco.MjModel, mujoco.MjData], side: str, angles_deg: list[float]) -> np.ndarray:
    """The pinch point in the frame of the base."""
    model, data = robot
    mujoco.mj_resetData(model, data)
    for name, angle in zip(kuavo.arm_joint_names(side), np.deg2rad(angles_deg), strict=True):
        data.qpos[model.joint(name).qposadr[0]] = angle
    mujoco.mj_kinematics(model, data)
    return data.site(f"{side}_pinch").xpos - [0, 0, kuavo.STANDING_HEIGHT_M]


@pytest.mark.parametrize(
    ("side", "angles_deg", "expected"),
    [
        ("left", [0] * 7, (-0.017, 0.293, -0.263)),
        ("right", [0] * 7, (-0.017, -0.293, -0.263)),
        ("left", [20, 0, 0, -30, 0, 0, 0], (-0.045, 0.293, -0.250)),
        ("right", [20, 0, 0, -30, 0, 0, 0], (-0.045, -0.293, -0.250)),
        ("left", [-10, 15, 25, -95, -90, 25, -20], (0.384, 0.461, 0.328)),
        ("left", [-10, 15, 25, -95, -90, 15, -20], (0.398, 0.473, 0.307)),
        ("right", [50, 0, 0, -140, 90, 0, 0], (0.181, -0.293, 0.207)),
        ("left", [0, 0, 0, 0, -90, 0, 0], (-0.018, 0.293, -0.263)),
        ("right", [20, 0, 0, -120, 90, 0, 0], (0.305, -0.293, 0.201)),
        ("left", [30, 0, 0, -140, 70, 0, 0], (0.244, 0.293, 0.288)),
        ("right", [10, 5, 0, -130, 90, 75, 0], (0.285, -0.271, 0.122)),
    ],
)
def test_pinch_points_are_the_published_ones_within_a_millimetre(robot, side, angles_deg, expected):
    assert pinch(robot, side, angles_deg) == pytest.approx(expected, abs=0.001)


def test_the_arms_are_mirror_images(robot):
    left = pinch(robot, "left", [-20, 10, 30, -80, -40, 12, 8])
    right = pinch(robot, "right", [-20, -10, -30, -80, 40, -12, 8])
    # l6 sits 0.2 mm off the axis, r6 does not.
    assert left * [1, -1, 1] == pytest.approx(right, abs=0.0003)


def test_arm_reach(robot):
    stretched = pinch(robot, "left", [0] * 7)
    shoulder = np.array(kuavo.LEFT_ARM[0].offset)
    assert np.linalg.norm(stretched - shoulder) == pytest.approx(0.687, abs=0.002)


def test_head_camera_is_where_and_looks_where_the_contest_has_it(robot):
    model, data = robot
    mujoco.mj_forward(model, data)
    camera = data.camera("head_cam_h")
    assert camera.xpos - [0, 0, kuavo.STANDING_HEIGHT_M] == pytest.approx([0.104, 0, 0.698], abs=0.001)
    ahead = -camera.xmat.reshape(3, 3)[:, 2]
    assert np.rad2deg(np.arcsin(-ahead[2])) == pytest.approx(42.0, abs=0.1)
    assert ahead[1] == pytest.approx(0.0, abs=1e-6)
    image_right = camera.xmat.reshape(3, 3)[:, 0]
    assert image_right == pytest.approx([0, -1, 0], abs=1e-5)
    assert model.camera("head_cam_h").fovy[0] == 85


def test_wrist_cameras_look_along_the_hand_and_are_half_a_turn_apart(robot):
    model, data = robot
    mujoco.mj_resetData(model, data)
    mujoco.mj_forward(model, data)
    left, right = (data.camera(f"wrist_cam_{side}").xmat.reshape(3, 3) for side in "lr")
    assert -left[:, 2] == pytest.approx([0, 0, -1], abs=1e-6)
    assert right == pytest.approx(left * [-1, -1, 1], abs=1e-5)
    assert data.camera("wrist_cam_l").xpos - data.body("zarm_l7_link").xpos == pytest.approx([0, 0.05, 0])
    assert data.camera("wrist_cam_r").xpos - data.body("zarm_r7_link").xpos == pytest.approx([0, -0.05, 0])


@pytest.mark.parametrize("side", kuavo.SIDES)
def test_open_jaw_is_85_mm_wide_across_the_hands_x(robot, side):
    model, data = robot
    mujoco.mj_resetData(model, data)
    for letter in "ab":
        data.qpos[model.joint(f"{side}_finger_{letter}").qposadr[0]] = kuavo.GRIPPER_OPENING_M / 2
    mujoco.mj_kinematics(model, data)
    centres = [data.geom(f"{side}_finger_{letter}_upper_pad").xpos for letter in "ab"]
    half_pad = model.geom(f"{side}_finger_a_upper_pad").size[0]
    apart = centres[0] - centres[1]
    assert apart[0] - 2 * half_pad == pytest.approx(0.085, abs=1e-6)
    assert apart[1:] == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("side", kuavo.SIDES)
def test_masses_are_the_published_ones(robot, side):
    model, _ = robot
    arm = [model.body(f"zarm_{side[0]}{number}_link").mass[0] for number in range(1, 8)]
    assert arm == pytest.approx([0.962, 0.570, 1.650, 0.429, 0.610, 0.331, 0.6405])
    gripper = sum(
        model.body(name).mass[0] for name in (f"{side}_palm", f"{side}_finger_a", f"{side}_finger_b")
    )
    assert gripper == pytest.approx(0.777)


@pytest.mark.parametrize(("spec_name", "mobile"), [("kuavo_sim", False), ("kuavo_mobile", True)])
def test_simulator_and_robot_description_agree(spec_name, mobile):
    spec = load_spec(spec_name)
    assert spec.action_names == action_names(mobile)
    assert spec.state_names == kuavo.STATE_NAMES
    limits = spec.limits(spec.action_names)
    lower, upper = action_limits(mobile)
    # pi is written with 5 digits in one place and with 4 in the other.
    assert limits.lower == pytest.approx(lower, abs=2e-3)
    assert limits.upper == pytest.approx(upper, abs=2e-3)
    assert np.all(limits.lower >= lower - 2e-3)
    # What the guard lets through in 10 ms, the motors can do; the gripper is slower than the guard allows.
    arms = [index for index, name in enumerate(kuavo.STATE_NAMES) if name.startswith("zarm")]
    assert np.all(limits.velocity[arms] <= velocity_limits()[arms])


def test_model_ranges_are_those_commands_are_checked_against(robot):
    model, _ = robot
    lower, upper = action_limits(mobile=False)
    for index, name in enumerate(kuavo.STATE_NAMES):
        if name.startswith("zarm"):
            assert model.joint(name).range == pytest.approx([lower[index], upper[index]])


def test_nothing_but_the_fingers_symmetry_is_a_constraint(robot):
    """Objects are held by contact alone: there is no weld or connect that could glue them."""
    model, _ = robot
    assert model.neq == 2
    assert set(model.eq_type.tolist()) == {int(mujoco.mjtEq.mjEQ_JOINT)}
    assert model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    assert model.opt.impratio == 10
    assert model.opt.timestep == pytest.approx(1 / 500)
