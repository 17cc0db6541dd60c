"""The one translation between messages and vectors; order, units and names come from the description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kuavo_smolvla_ros.robot.description import VALUE, Block, RobotSpec
from kuavo_smolvla_ros.robot.fields import MessageError
from kuavo_smolvla_ros.robot.units import FloatArray

Fields = dict[str, Any]


def decode_state(spec: RobotSpec, messages: Mapping[str, Any]) -> FloatArray:
    """Messages by stream name to the state vector, in the vector's units."""
    return _decode(spec.state, messages)


def decode_action(spec: RobotSpec, messages: Mapping[str, Any]) -> FloatArray:
    """Command messages to the action vector, without the joint of a gap rule, which no message carries."""
    return _decode(spec.action, messages)


def decode_hold(spec: RobotSpec, messages: Mapping[str, Any]) -> FloatArray:
    """Measured values of the joints that only keep their pose, in the order of `spec.hold_names`."""
    values = _decode(spec.hold_state, messages)
    by_name = dict(zip((n for b in spec.hold_state for n in b.joints), values, strict=True))
    return np.array([by_name[name] for name in spec.hold_names], dtype=np.float64)


def encode_action(spec: RobotSpec, action: FloatArray, held: FloatArray | None = None) -> dict[str, Fields]:
    """A vector to the fields of each command message; streams whose gate is closed are left out.

    `held` are the values of `spec.hold_names`, needed where the description has any.
    """
    values = _by_name(spec.action_names, action, "action")
    values |= _by_name(spec.hold_names, np.empty(0) if held is None else held, "held")
    return {
        name: {**stream.constants, **_encode_stream(name, spec, values)}
        for name, stream in spec.outputs.items()
        if stream.gate is None or stream.gate.is_open(values[stream.gate.joint])
    }


def encode_state(spec: RobotSpec, state: FloatArray, held: FloatArray | None = None) -> dict[str, Fields]:
    """The reverse of `decode_state`, for simulators and tests that play the robot's part."""
    values = _by_name(spec.state_names, state, "state")
    hold_names = tuple(n for b in spec.hold_state for n in b.joints)
    values |= _by_name(hold_names, np.empty(0) if held is None else held, "held")
    blocks = (*spec.state, *spec.hold_state)
    return {
        name: _fields([b for b in blocks if b.stream == name], values) for name in {b.stream for b in blocks}
    }


def _by_name(names: Sequence[str], values: FloatArray, what: str) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(names),):
        raise MessageError(f"{what}: {array.shape} values for {len(names)} joints")
    _require_finite(array, names, what)
    return dict(zip(names, array.tolist(), strict=True))


def _require_finite(values: FloatArray, names: Sequence[str], what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise MessageError(f"{what}: {names[int(bad[0])]} is {values[bad[0]]}")


def decode_block(block: Block, message: Any) -> FloatArray:
    """The values of one block's joints, in the vector's units; a joint that is not finite is an error."""
    try:
        values = block.unit.to_vector(_read(block, message))
    except MessageError as error:
        raise MessageError(f"stream '{block.stream}': {error}") from None
    _require_finite(values, block.joints, f"stream '{block.stream}'")
    return values


def _decode(blocks: tuple[Block, ...], messages: Mapping[str, Any]) -> FloatArray:
    parts = []
    for block in blocks:
        if block.stream not in messages:
            joints = ", ".join(block.joints)
            raise MessageError(f"stream '{block.stream}': no message, it holds {joints}")
        parts.append(decode_block(block, messages[block.stream]))
    return np.concatenate(parts) if parts else np.empty(0)


def _read(block: Block, message: Any) -> FloatArray:
    if block.names_path is not None:
        return _read_named(block, message)
    numbers = block.path.numbers(message)
    if block.spread:
        own = block.spread.index(VALUE)
        return numbers[own : own + 1]
    if numbers.size != len(block.joints):
        raise MessageError(f"'{block.path}' holds {numbers.size} values for {len(block.joints)} joints")
    return numbers


def _read_named(block: Block, message: Any) -> FloatArray:
    assert block.names_path is not None
    there = list(block.names_path.value(message))
    numbers = block.path.numbers(message)
    if len(there) != numbers.size:
        raise MessageError(
            f"{len(there)} names in '{block.names_path}' for {numbers.size} values in '{block.path}'"
        )
    index = {name: i for i, name in enumerate(there)}
    if len(index) != len(there):
        raise MessageError(f"a name stands twice in '{block.names_path}': {', '.join(there)}")
    missing = [name for name in block.wire_names if name not in index]
    if missing:
        raise MessageError(
            f"the joint '{missing[0]}' is missing; the message names {', '.join(there) or 'none'}"
        )
    picked: FloatArray = numbers[[index[name] for name in block.wire_names]]
    return picked


def _encode_stream(stream: str, spec: RobotSpec, values: Mapping[str, float]) -> Fields:
    return _fields([b for b in (*spec.action, *spec.hold_action) if b.stream == stream], values)


def _fields(blocks: list[Block], values: Mapping[str, float]) -> Fields:
    fields: Fields = {}
    arrays: dict[str, dict[int, float]] = {}
    for block in blocks:
        wire = block.unit.to_wire(np.array([values[name] for name in block.joints])).tolist()
        if block.names_path is not None:
            fields.setdefault(block.names_path.dotted, []).extend(block.wire_names)
            fields.setdefault(block.path.dotted, []).extend(wire)
        elif block.path.start is None:
            fields[block.path.dotted] = wire[0]
        else:
            spread = [wire[0] if v == VALUE else float(v) for v in block.spread] if block.spread else wire
            places = arrays.setdefault(block.path.dotted, {})
            places.update(enumerate(spread, start=block.path.start))
    for dotted, places in arrays.items():
        if len(places) != max(places) + 1:
            hole = min(set(range(max(places))) - set(places))
            raise MessageError(f"'{dotted}[{hole}]' belongs to no joint, so there is nothing to write there")
        fields[dotted] = [places[i] for i in sorted(places)]
    return fields
