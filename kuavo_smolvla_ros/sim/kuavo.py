"""The numbers of a Kuavo 4 Pro, version 45: arm chains, masses, limits, cameras. Nothing is computed here.

Zero pose: both arms straight down; x forward, y left, z up. All arm frames are parallel to the base in that
pose.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_PI = 1.5708
STANDING_HEIGHT_M = 0.844
BASE_MASS_KG = 22.1
BASE_COM = (-0.0185, 0.0, 0.193)

PHYSICS_PERIOD_S = 0.002
CONTROL_PERIOD_S = 0.01
POLICY_PERIOD_S = 0.1

PINCH_BELOW_L7_M = 0.1488
GRIPPER_OPENING_M = 0.085
GRIPPER_MASS_KG = 0.777
GRIPPER_VELOCITY_PER_S = 2.0
"""The jaw closes its 85 mm in half a second."""

ARM_KP = 500.0
ARM_KD = 50.0
"""The arm gains of the robot's own configuration; kd / kp is the 0.1 s by which an arm lags its target."""

HEAD_POSITION = (-0.0185, 0.0, 0.6014)
HEAD_CAMERA_POSITION = (0.1, 0.0, 0.12)
HEAD_CAMERA_QUAT = (0.612372, 0.353553, -0.353553, -0.612372)
HEAD_CAMERA_FOVY_DEG = 85.0
WRIST_CAMERA_OFFSET_M = 0.05
WRIST_CAMERA_FOVY_DEG = 60.0

BASE_VELOCITY = (0.4, 0.2, 0.4)
"""Walking speeds the robot's own interface clamps to: x m/s, y m/s, yaw rad/s."""
BASE_RANGE = (2.0, 2.0, 3.14)


@dataclass(frozen=True)
class ArmJoint:
    """One joint of the left arm; the right arm is its mirror image in y."""

    offset: tuple[float, float, float]
    axis: str
    lower: float
    upper: float
    effort_nm: float
    velocity: float
    mass_kg: float
    com: tuple[float, float, float]


# Velocity is the motor's peak where that is below the 10 rad/s of its configuration (the URDF's numbers are
# higher).
LEFT_ARM = (
    ArmJoint(
        (-0.0175, 0.2927, 0.4245), "y", -3.14159, HALF_PI, 100.0, 10.0, 0.962, (-0.0008, -0.0222, 0.0003)
    ),
    ArmJoint((0.0, 0.0, 0.0), "x", -0.349, 2.094, 50.0, 8.0, 0.570, (-0.0079, 0.0, -0.0466)),
    ArmJoint((0.0, 0.0, 0.0), "z", -HALF_PI, HALF_PI, 39.0, 7.5, 1.650, (0.0063, 0.0011, -0.2088)),
    ArmJoint((0.02, 0.0, -0.2837), "y", -2.618, 0.0, 50.0, 8.0, 0.429, (-0.0161, 0.0014, -0.0486)),
    ArmJoint((-0.02, 0.0, -0.127037), "z", -HALF_PI, HALF_PI, 12.0, 7.0, 0.610, (-0.0021, 0.0002, -0.0508)),
    ArmJoint((0.0002, 0.0, -0.106463), "x", -1.309, 0.698, 12.0, 7.0, 0.331, (-0.0011, 0.0034, -0.0134)),
    ArmJoint((0.0, 0.0, -0.0210005), "y", -0.698, 0.698, 12.0, 7.0, 0.6405, (0.0019, 0.0101, -0.0905)),
)


def mirrored(joint: ArmJoint, index: int) -> ArmJoint:
    """The right arm's joint: y offsets and coms change sign, roll ranges swap; r6 sits exactly on the
    axis."""
    x, y, z = joint.offset
    if index == 5:
        x = 0.0
    lower, upper = (-joint.upper, -joint.lower) if joint.axis == "x" else (joint.lower, joint.upper)
    cx, cy, cz = joint.com
    return ArmJoint(
        (x, -y, z), joint.axis, lower, upper, joint.effort_nm, joint.velocity, joint.mass_kg, (cx, -cy, cz)
    )


RIGHT_ARM = tuple(mirrored(joint, index) for index, joint in enumerate(LEFT_ARM))
SIDES = ("left", "right")
ARMS = {"left": LEFT_ARM, "right": RIGHT_ARM}


def arm_joint_names(side: str) -> tuple[str, ...]:
    return tuple(f"zarm_{side[0]}{number}_joint" for number in range(1, 8))


STATE_NAMES = (
    *arm_joint_names("left"),
    "left_gripper",
    *arm_joint_names("right"),
    "right_gripper",
)
BASE_NAMES = ("base_x", "base_y", "base_yaw", "base_move")
ARM_SLICE = {"left": slice(0, 7), "right": slice(8, 15)}
GRIPPER_INDEX = {"left": 7, "right": 15}
