"""Everything the executor can say about itself, as enums: states, why it stopped, why it refused a chunk."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """What the executor is doing."""

    IDLE = "idle"
    RAMPING = "ramping"
    FOLLOWING = "following"
    STOPPING = "stopping"
    HOLDING = "holding"


class StopReason(str, Enum):
    """Why motion ended, from the most to the least urgent: of several at once, the first is reported."""

    E_STOP = "e_stop"
    FOREIGN_PUBLISHER = "foreign_publisher"
    SHUTDOWN = "shutdown"
    OPERATOR_STOP = "operator_stop"
    OPERATOR_PAUSE = "operator_pause"
    CLOCK_JUMP = "clock_jump"
    CONTROL_GAP = "control_gap"
    JOINT_STATE_INVALID = "joint_state_invalid"
    JOINT_STATE_STALE = "joint_state_stale"
    PRECONDITION = "precondition"
    FOLLOWING_ERROR = "following_error"
    POLICY_LOST = "policy_lost"
    STARVED = "starved"
    TASK_SWITCH = "task_switch"


class RefusalReason(str, Enum):
    """Why nothing of a chunk was used. A refused chunk stops nothing by itself: the plan in force goes on."""

    FOREIGN_FINGERPRINT = "foreign_fingerprint"
    WRONG_NAMES = "wrong_names"
    WRONG_SHAPE = "wrong_shape"
    TIMES_NOT_INCREASING = "times_not_increasing"
    TOO_LONG = "too_long"
    NON_FINITE = "non_finite"
    OUTSIDE_LIMITS = "outside_limits"
    DUPLICATE = "duplicate"
    OUT_OF_ORDER = "out_of_order"
    FROM_THE_FUTURE = "from_the_future"
    STALE = "stale"
    EXPIRED = "expired"
    TOO_FAR_FROM_POSE = "too_far_from_pose"
    NO_MEASURED_POSE = "no_measured_pose"
    STOPPED = "stopped"


class Request(str, Enum):
    """What an operator can ask for."""

    STOP = "stop"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    RESUME = "resume"
    E_STOP = "e_stop"
    RELEASE_E_STOP = "release_e_stop"
    SHUTDOWN = "shutdown"


class Transition(str, Enum):
    """What happens to the chunk in force when one of another task arrives."""

    FINISH_CHUNK = "finish_chunk"
    BLEND = "blend"
    STOP_THEN_SWITCH = "stop_then_switch"


ADVICE: dict[StopReason, str] = {
    StopReason.E_STOP: "clear the danger, release the emergency stop, then resume",
    StopReason.FOREIGN_PUBLISHER: "end the other program that publishes the arm command, then resume",
    StopReason.SHUTDOWN: "none: the executor is ending; start it again",
    StopReason.OPERATOR_STOP: "resume when ready",
    StopReason.OPERATOR_PAUSE: "unpause when ready",
    StopReason.CLOCK_JUMP: "let the clock settle (simulator reset, time synchronisation), then resume",
    StopReason.CONTROL_GAP: "free the machine (another process starved the executor), then resume",
    StopReason.JOINT_STATE_INVALID: "repair the joint state (NaN or wrong width at its source), then resume",
    StopReason.JOINT_STATE_STALE: "bring the joint state topic back (driver, bridge, network), then resume",
    StopReason.PRECONDITION: "bring the robot into the state the message names, then resume",
    StopReason.FOLLOWING_ERROR: "look for a blocked arm or a controller that ignores commands, then resume",
    StopReason.POLICY_LOST: "start the policy node again, then resume",
    StopReason.STARVED: "see why no new chunk came (cameras, inference time, refused chunks), then resume",
    StopReason.TASK_SWITCH: "none: motion goes on with the new task by itself",
}
