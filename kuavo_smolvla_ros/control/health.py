"""What must be true of the robot and the policy for motion to go on; each check names what is not."""

from __future__ import annotations

import numpy as np

from kuavo_smolvla_ros.control.chunk import NS_PER_S, FloatArray
from kuavo_smolvla_ros.control.reasons import StopReason
from kuavo_smolvla_ros.control.records import Inputs, JointSample
from kuavo_smolvla_ros.control.settings import Settings

Fault = tuple[StopReason, str]


class Health:
    """Checks over one period's inputs, with the places of joints worked out once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._width = len(settings.measured_names)
        self._pose_in_command = settings.index(settings.pose_names)
        self._pose_in_sample = settings.places(settings.measured_names, settings.pose_names)

    def joint_fault(self, now: Inputs) -> Fault | None:
        """Why the measured pose of this period cannot be relied on, or None."""
        s, joints = self.settings, now.joints
        if joints is None:
            return StopReason.JOINT_STATE_STALE, "no joint state was received"
        if joints.positions.shape != (self._width,):
            detail = f"joint state has shape {joints.positions.shape} for {self._width} joints"
            return StopReason.JOINT_STATE_INVALID, detail
        bad = np.flatnonzero(~np.isfinite(joints.positions))
        if bad.size:
            name, value = s.measured_names[int(bad[0])], joints.positions[bad[0]]
            return StopReason.JOINT_STATE_INVALID, f"measured {name} is {value}"
        age_s = (now.ros_ns - joints.stamp_ns) / NS_PER_S
        if age_s > s.joint_state_max_age_s:
            detail = f"joint state is {age_s:.3f} s old (at most {s.joint_state_max_age_s:g} s)"
            return StopReason.JOINT_STATE_STALE, detail
        if age_s < -s.max_ahead_s:
            return StopReason.JOINT_STATE_STALE, f"joint state is stamped {-age_s:.3f} s ahead of the clock"
        silence_s = (now.mono_ns - joints.heard_ns) / NS_PER_S
        if silence_s > s.joint_state_max_silence_s:
            return (
                StopReason.JOINT_STATE_STALE,
                f"no joint state for {silence_s:.3f} s by the monotonic clock",
            )
        return None

    def pose_errors(self, command: FloatArray, joints: JointSample) -> FloatArray:
        """How far each arm joint is measured from its command."""
        errors: FloatArray = np.abs(command[self._pose_in_command] - joints.positions[self._pose_in_sample])
        return errors

    def following_error(self, command: FloatArray, joints: JointSample) -> Fault | None:
        """An arm that does not go where it is told: blocked, or its controller listens to someone else."""
        errors = self.pose_errors(command, joints)
        if not errors.size or errors.max() <= self.settings.max_following_error:
            return None
        worst = int(np.argmax(errors))
        detail = f"{self.settings.pose_names[worst]} is measured {errors[worst]:.2f} from its command"
        return StopReason.FOLLOWING_ERROR, detail

    def policy_fault(self, mono_ns: int, heard_ns: int | None) -> Fault | None:
        """A policy process that gives no sign of life, by the monotonic clock."""
        limit_s = self.settings.policy_max_silence_s
        silence_s = np.inf if heard_ns is None else (mono_ns - heard_ns) / NS_PER_S
        if silence_s <= limit_s:
            return None
        detail = f"no sign of the policy for {silence_s:.3f} s (at most {limit_s:g} s)"
        return StopReason.POLICY_LOST, detail

    def outside_limits(self, joints: JointSample) -> str | None:
        """An arm joint measured so far outside its limits that motion must not begin."""
        limits, at = self.settings.limits, self._pose_in_command
        pose = joints.positions[self._pose_in_sample]
        excess = np.maximum(limits.lower[at] - pose, pose - limits.upper[at])
        if not excess.size or excess.max() <= self.settings.start_outside:
            return None
        worst = int(np.argmax(excess))
        name = self.settings.pose_names[worst]
        return f"{name} is measured {excess[worst]:.2f} outside its limits; move it inside by hand"
