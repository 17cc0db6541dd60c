"""Joint angles for a pose of the gripper: mink's differential inverse kinematics on a model of one arm."""

from __future__ import annotations

import mink
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.model import add_robot, new_spec

Array = NDArray[np.float64]

UP = np.array([0.0, 0.0, 1.0])
LIMIT_MARGIN_RAD = 0.02
"""An expert stays this far inside the limits, so that no rounding on the way turns its commands into
refused ones."""
ITERATIONS = 4
PROBE_ITERATIONS = 25
COMFORT_DEG = {"left": (-10, 15, 25, -95, -80, 10, 0), "right": (-10, -15, -25, -95, 80, -10, 0)}
"""Elbow low and a little out, hand ahead: what the seventh joint's freedom is spent on."""


def hand_pose(
    side: str, position: ArrayLike, yaw_rad: float, pitch_rad: float, roll_rad: float = 0.0
) -> mink.SE3:
    """The pinch pose of a hand that points along `yaw` (0 ahead, positive to the left) and `pitch`
    (positive down).

    At roll 0 the jaw opens sideways and the hand is turned as the robot's ready poses turn it.
    """
    ahead = np.array(
        [np.cos(yaw_rad) * np.cos(pitch_rad), np.sin(yaw_rad) * np.cos(pitch_rad), -np.sin(pitch_rad)]
    )
    sideways = np.array([-np.sin(yaw_rad), np.cos(yaw_rad), 0.0])
    upwards = np.cross(ahead, sideways)
    across = np.cos(roll_rad) * sideways + np.sin(roll_rad) * upwards
    x = -across if side == "left" else across
    z = -ahead
    rotation = np.stack([x, np.cross(z, x), z], axis=1)
    return mink.SE3.from_rotation_and_translation(mink.SO3.from_matrix(rotation), np.asarray(position, float))


def approach(start: mink.SE3, first: mink.SE3, goal: mink.SE3, share: float) -> mink.SE3:
    """Part of the way from `start` to a goal that was at `first` when the way began and is at `goal` now.

    What shrinks is the difference to the goal, so a hand that starts beside a moving thing stays beside it.
    For a goal at rest this is a straight line in position and the shortest turn.
    """
    left = 1.0 - share
    position = goal.translation() + left * (start.translation() - first.translation())
    turn = (first.rotation().inverse() @ start.rotation()).log()
    rotation = goal.rotation() @ mink.SO3.exp(left * turn)
    return mink.SE3.from_rotation_and_translation(rotation, position)


class ArmIK:
    """One arm's angles, moved a little at a time towards a pinch pose given in the frame of the standing
    robot."""

    def __init__(self, side: str) -> None:
        spec = new_spec()
        add_robot(spec, mobile=False, head_pitch_rad=0.0, sides=(side,))
        model = spec.compile()
        self._qpos = np.array([model.joint(name).qposadr[0] for name in kuavo.arm_joint_names(side)])
        model.jnt_range[self._qpos] += [LIMIT_MARGIN_RAD, -LIMIT_MARGIN_RAD]
        self._lower, self._upper = model.jnt_range[self._qpos].T
        self._site = f"{side}_pinch"
        self._configuration = mink.Configuration(model)
        self._pose = mink.FrameTask(
            self._site, "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-3
        )
        self._comfort = mink.PostureTask(model, cost=2e-3)
        self.prefer(np.deg2rad(COMFORT_DEG[side]))
        self._limits = [mink.ConfigurationLimit(model)]

    def prefer(self, joints: ArrayLike) -> None:
        """What the seventh joint's freedom is spent on from now on, instead of `COMFORT_DEG`."""
        comfortable = self._configuration.q.copy()
        comfortable[self._qpos] = joints
        self._comfort.set_target(comfortable)

    @property
    def joints(self) -> Array:
        return self._configuration.q[self._qpos].copy()

    def set_joints(self, joints: ArrayLike) -> None:
        q = self._configuration.q.copy()
        q[self._qpos] = np.clip(joints, self._lower, self._upper)
        self._configuration.update(q)

    def pose(self) -> mink.SE3:
        """Where the pinch point is at the present angles."""
        return self._configuration.get_transform_frame_to_world(self._site, "site")

    def solve(self, goal: mink.SE3, iterations: int = ITERATIONS) -> tuple[float, float]:
        """Move the angles towards a goal; how far (m) and how turned (rad) the pinch still is from it."""
        self._pose.set_target(goal)
        for _ in range(iterations):
            velocity = mink.solve_ik(
                self._configuration,
                [self._pose, self._comfort],
                kuavo.POLICY_PERIOD_S,
                "daqp",
                limits=self._limits,
                damping=1e-4,
            )
            self._configuration.integrate_inplace(velocity, kuavo.POLICY_PERIOD_S)
        error = self._pose.compute_error(self._configuration)
        return float(np.linalg.norm(error[:3])), float(np.linalg.norm(error[3:]))

    def probe(self, goal: mink.SE3) -> tuple[Array, float]:
        """The angles a goal would be met with from here, and how badly it would be missed, in metres (a
        radian counts as 0.1 m); nothing moves."""
        joints = self.joints
        distance, turn = self.solve(goal, iterations=PROBE_ITERATIONS)
        found = self.joints
        self.set_joints(joints)
        return found, distance + 0.1 * turn
