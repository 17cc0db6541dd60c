"""Reading serialized ROS 2 messages with rosbags, including the ones ROS 2 itself writes with a loose end.

rclpy serializes a message whose sequences are empty (a JointState with positions only) with a few bytes
behind its end: it sizes the buffer by an upper bound and hands out all of it. rosbags takes that for damage.
Those bytes are cut off here, a few and only where what stands before them is a whole message, so that a
truncated or mistyped message still fails.
"""

from __future__ import annotations

from typing import Any, Protocol

from kuavo_smolvla_ros.robot.fields import MessageError

_LOOSE_END_BYTES = (0, 4, 8, 12, 16)  # 12 is the most that three empty sequences were seen to leave


class TypeStore(Protocol):
    """The part of a rosbags type store that is used here."""

    def deserialize_cdr(self, rawdata: bytes, typename: str) -> Any: ...


def deserialize(store: TypeStore, raw: bytes, typename: str) -> Any:
    """One message from its CDR bytes; MessageError where they hold no whole message of this type."""
    first: Exception | None = None
    for cut in _LOOSE_END_BYTES:
        try:
            return store.deserialize_cdr(raw[: len(raw) - cut] if cut else raw, typename)
        except KeyError:
            raise MessageError(
                f"the message type {typename} is unknown; register its definition first"
            ) from None
        except Exception as error:  # rosbags, struct and numpy each raise their own for damaged bytes
            first = first or error
    raise MessageError(f"{len(raw)} bytes are no whole {typename}: {first}")
