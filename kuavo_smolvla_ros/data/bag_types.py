"""Message types as a recording itself defines them, one store per type so that recordings cannot disagree."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from rosbags.typesys import Stores, TypesysError, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from kuavo_smolvla_ros.data.bag_storage import Channel
from kuavo_smolvla_ros.data.kuavo_messages import register_kuavo_messages
from kuavo_smolvla_ros.robot.cdr import deserialize
from kuavo_smolvla_ros.robot.fields import MessageError

# ROS 1 lets constants be called as one likes (kuavo_msgs has `int8 kError=-1`), and rosbags takes such a line
# for a field or fails on it. Constants are no part of a message's bytes, so they are left out.
_CONSTANT = re.compile(r"^[ \t]*\S+[ \t]+\w+[ \t]*=.*$", re.MULTILINE)
_SECTION = "=" * 80 + "\n"


def decode(channel: Channel, raw: bytes) -> Any:
    """The message object; MessageError where the bytes hold no whole message of the type."""
    store = type_store(channel)
    if channel.serialization == "cdr":
        return deserialize(store, raw, channel.type)
    if channel.serialization != "ros1":
        raise MessageError(f"messages on {channel.topic} are serialized as '{channel.serialization}'")
    try:
        return store.deserialize_ros1(raw, channel.type)
    except KeyError:
        raise MessageError(f"the message type {channel.type} is unknown") from None
    except Exception as error:  # rosbags, struct and numpy each raise their own for damaged bytes
        raise MessageError(f"{len(raw)} bytes are no whole {channel.type}: {error}") from None


def starts_with_header(channel: Channel) -> bool:
    """Whether a message of this type carries its stamp in its first bytes."""
    fields = type_store(channel).fielddefs[channel.type][1]
    return bool(fields) and fields[0][0] == "header" and fields[0][1][1] == "std_msgs/msg/Header"


def type_store(channel: Channel) -> Typestore:
    store = _store(channel.type, channel.definition, channel.definition_format, channel.serialization)
    if channel.type not in store.fielddefs:
        raise MessageError(
            f"the recording does not define {channel.type} ({channel.topic}) and it is no standard type; "
            "record it as MCAP or ROS 1 bag, which carry their definitions"
        )
    return store


@lru_cache(maxsize=256)
def _store(type_name: str, definition: str, definition_format: str, serialization: str) -> Typestore:
    if not definition:
        standard = Stores.ROS1_NOETIC if serialization == "ros1" else Stores.ROS2_JAZZY
        return register_kuavo_messages(get_typestore(standard))
    store = get_typestore(Stores.EMPTY)
    try:
        if definition_format == "idl":
            store.register(_types_of_idl(definition))
        else:
            store.register(get_types_from_msg(_CONSTANT.sub("", definition), type_name))
    except TypesysError as error:
        raise MessageError(f"the recording's definition of {type_name} cannot be read: {error}") from error
    return store


def _types_of_idl(definition: str) -> dict[str, Any]:
    if not definition.startswith(f"{_SECTION}IDL: "):
        return dict(get_types_from_idl(definition))
    types: dict[str, Any] = {}
    for part in definition.split(_SECTION)[1:]:
        types |= get_types_from_idl(part.partition("\n")[2])
    return types
