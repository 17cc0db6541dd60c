"""When the next thought is due, and how a chunk is timed: the policy's two modes, without ROS or a thread.

Realtime: a chunk's steps keep the times they were meant for, counted from the observation, and the next
thought begins `n_action_steps` after it, told what will be executed meanwhile. In turns ("synchronous"): the
robot waits for each chunk, of which the first `n_action_steps` begin when it is there.
"""

from __future__ import annotations

import numpy as np

from kuavo_smolvla_ros.control.chunk import ActionChunk
from kuavo_smolvla_ros.control.settings import Settings
from kuavo_smolvla_ros.robot.description import RobotSpec
from kuavo_smolvla_ros.robot.messages import NS_PER_S

HOLD_S = 10.0  # how long the arms wait at a chunk's end for the next one, where the policy works in turns
# Farther than this from the plan the arms do not follow it: a chunk that far is refused by the executor.
LEFT_BEHIND_RAD = Settings.refuse_above


def next_due_ns(chunk: ActionChunk, n_action_steps: int, fps: float) -> int:
    """The earliest time of the observation after this chunk's."""
    return chunk.stamp_ns + int(chunk.times_ns[0]) + round(n_action_steps * NS_PER_S / fps)


def in_turns(
    values: np.ndarray, times_ns: np.ndarray, n_action_steps: int, late_ns: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first steps only, from `late_ns` after the observation on, and the last one held.

    Nothing was executed while the policy was thinking, so nothing of its answer is past.
    """
    count = min(n_action_steps, len(values))
    values = np.concatenate([values[:count], values[count - 1 : count]])
    return values, late_ns + np.append(times_ns[:count], times_ns[count - 1] + round(HOLD_S * NS_PER_S))


def standing(spec: RobotSpec, state: np.ndarray) -> np.ndarray | None:
    """The action that leaves the robot where it is measured; None where nobody measures what must be told.

    A base that is told to stand is told nothing else that counts.
    """
    gate_of = {
        name: gate
        for block in spec.action
        if (gate := spec.streams[block.stream].gate)
        for name in block.joints
    }
    flags = {gate.joint for gate in gate_of.values()}
    action = np.zeros(len(spec.action_names))
    for at, name in enumerate(spec.action_names):
        gate = gate_of.get(name)
        if name in spec.state_names:
            action[at] = state[spec.state_names.index(name)]
        elif name not in flags and (gate is None or gate.is_open(0.0)):
            return None
    return action


def followed(
    spec: RobotSpec, previous: ActionChunk | None, state: np.ndarray, t_ns: int
) -> ActionChunk | None:
    """The previous chunk if the arms are where it has them; None where it was refused, or they were stopped.

    A chunk that continues one which nobody executes begins ever farther from the arms, and is refused again.
    """
    if previous is None:
        return None
    at_ns = min(max(t_ns - previous.stamp_ns, 0), int(previous.times_ns[-1]))
    for at, name in enumerate(previous.names):
        if not spec.joints[name].of_an_arm or name not in spec.state_names:
            continue
        planned = np.interp(at_ns, previous.times_ns, previous.values[:, at])
        if abs(planned - state[spec.state_names.index(name)]) > LEFT_BEHIND_RAD:
            return None
    return previous


def to_continue(
    spec: RobotSpec, previous: ActionChunk | None, state: np.ndarray, t_ns: int, latency_s: float, most: int
) -> tuple[np.ndarray | None, int]:
    """What `continued` says, of the previous chunk where the arms follow it, else of arms that stand."""
    previous = followed(spec, previous, state, t_ns)
    return continued(previous, t_ns, spec.fps, latency_s, standing(spec, state), most)


def continued(
    previous: ActionChunk | None,
    t_ns: int,
    fps: float,
    latency_s: float,
    still: np.ndarray | None = None,
    most: int = 8,
) -> tuple[np.ndarray | None, int]:
    """The rest of the previous chunk from an observation on, and how many steps of it will have been executed
    when the answer is there, if that takes `latency_s` of the robot's time.

    Before the first chunk, and after the last one's end, the robot is `still`, and will be when the answer is
    there: a chunk that knew nothing of that would by then be ahead of the arms, and one far ahead is refused.
    `most` steps of a chunk stand still at most, for a policy that takes longer than its chunk lasts.
    """
    # Needs torch, which takes seconds to import and by now has been: a wrong start fails before that.
    from kuavo_smolvla_ros.policy.rtc import delay_steps, remaining_chunk

    rest = None if previous is None else remaining_chunk(previous.values, previous.stamp_ns, t_ns, fps)
    if rest is None:
        # And the step that is due when the answer is there: from it the arms set out.
        delay = min(delay_steps(latency_s, fps) + 1, most)
        return (None, 0) if still is None else (np.tile(still, (delay, 1)), delay)
    return rest, min(delay_steps(latency_s, fps), len(rest))
