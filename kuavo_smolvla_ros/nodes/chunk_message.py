"""An action chunk as a JointTrajectory, and back.

The header's stamp is the observation's, point i lies `time_from_start` = i / fps after it. A trajectory has
no field for task and number, so the frame id carries them behind the fingerprint:
`fingerprint/sequence/task`.
"""

from __future__ import annotations

from typing import Any

from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from kuavo_smolvla_ros.control.chunk import ActionChunk, Refusal, chunk_from_points
from kuavo_smolvla_ros.control.reasons import RefusalReason
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, stamp_fields, stamp_ns

UNKNOWN_SEQUENCE = -1


def to_message(chunk: ActionChunk) -> JointTrajectory:
    """The message for a chunk; what is in it is the receiver's to judge."""
    points = [
        build(JointTrajectoryPoint, {"positions": row, **_duration(int(t))})
        for row, t in zip(chunk.values.tolist(), chunk.times_ns, strict=True)
    ]
    fields = {
        "header.frame_id": f"{chunk.fingerprint}/{chunk.sequence}/{chunk.task}",
        "joint_names": list(chunk.names),
        "points": points,
        **stamp_fields(chunk.stamp_ns),
    }
    return build(JointTrajectory, fields)


def from_message(message: Any) -> ActionChunk | Refusal:
    """The chunk in a message, or why there is none in it; whether it may be used is decided elsewhere."""
    parts = message.header.frame_id.split("/", 2)
    if len(parts) != 3 or not parts[1].isdecimal():
        detail = f"the frame id '{message.header.frame_id}' is not fingerprint/sequence/task"
        return Refusal(RefusalReason.FOREIGN_FINGERPRINT, detail, UNKNOWN_SEQUENCE)
    fingerprint, sequence, task = parts
    return chunk_from_points(
        [point.positions for point in message.points],
        stamp_ns=stamp_ns(message),
        times_ns=[_nanoseconds(point.time_from_start) for point in message.points],
        names=message.joint_names,
        task=task,
        sequence=int(sequence),
        fingerprint=fingerprint,
    )


def _duration(nanoseconds: int) -> dict[str, int]:
    return {"time_from_start.sec": nanoseconds // NS_PER_S, "time_from_start.nanosec": nanoseconds % NS_PER_S}


def _nanoseconds(duration: Any) -> int:
    return int(duration.sec) * NS_PER_S + int(duration.nanosec)
