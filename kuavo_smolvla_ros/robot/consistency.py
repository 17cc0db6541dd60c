"""What must hold between the parts of a robot description, beyond each key's own bounds."""

from __future__ import annotations

from collections import Counter

from kuavo_smolvla_ros.robot.description import Block, RobotSpec
from kuavo_smolvla_ros.robot.yaml_file import Section, SpecError

IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")


def check_consistency(spec: RobotSpec, root: Section) -> None:
    """Raise a SpecError that names the key where two parts of the description disagree."""
    _check_topics(spec, root)
    _check_cameras(spec, root)
    for key, blocks, direction in (
        ("state", spec.state, "in"),
        ("action", spec.action, "out"),
        ("hold", spec.hold_state, "in"),
        ("hold", spec.hold_action, "out"),
    ):
        _check_blocks(spec, root, key, blocks, direction)
    _check_names(spec, root)
    _check_command_layout(spec, root)
    _check_references(spec, root)


def _check_topics(spec: RobotSpec, root: Section) -> None:
    seen: dict[str, tuple[str, str]] = {}
    entries = [(f"streams.{s.name}", s.topic, s.type) for s in spec.streams.values()]
    entries += [(f"signals.{s.name}", s.topic, s.type) for s in spec.signals.values()]
    entries += [(f"preconditions.{c.name}", c.topic, c.type) for c in spec.preconditions]
    for where, topic, kind in entries:
        other, other_kind = seen.setdefault(topic, (where, kind))
        if other_kind != kind:
            raise root.error(None, f"{where}: the topic {topic} is {kind} here and {other_kind} in {other}")
    by_topic = Counter(s.topic for s in spec.streams.values())
    twice = [topic for topic, count in by_topic.items() if count > 1]
    if twice:
        raise root.error(
            "streams", f"the topic {twice[0]} stands in two streams; let blocks share one stream"
        )


def _check_cameras(spec: RobotSpec, root: Section) -> None:
    used: dict[str, str] = {}
    for camera in spec.cameras.values():
        stream = spec.streams.get(camera.stream)
        if stream is None or stream.direction != "in":
            raise root.error("cameras", f"{camera.name}: '{camera.stream}' is no incoming stream")
        if stream.type not in IMAGE_TYPES:
            raise root.error(
                "cameras", f"{camera.name}: {stream.type} carries no picture ({' or '.join(IMAGE_TYPES)})"
            )
        other = used.setdefault(camera.stream, camera.name)
        if other != camera.name:
            raise root.error("cameras", f"{camera.name} and {other} share the stream '{camera.stream}'")


def _check_blocks(
    spec: RobotSpec, root: Section, key: str, blocks: tuple[Block, ...], direction: str
) -> None:
    for block in blocks:
        stream = spec.streams.get(block.stream)
        if stream is None:
            raise root.error(key, f"the stream '{block.stream}' is not under 'streams'")
        if stream.direction != direction:
            raise root.error(
                key,
                f"the stream '{block.stream}' goes {stream.direction}, {key} needs one that goes {direction}",
            )


def _check_names(spec: RobotSpec, root: Section) -> None:
    for key, names in (("state", spec.state_names), ("action", spec.action_names + spec.hold_names)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise root.error(key, f"the joint '{twice[0]}' stands twice")
    held = {n for b in spec.hold_state for n in b.joints}
    if held != set(spec.hold_names):
        odd = ", ".join(sorted(held ^ set(spec.hold_names)))
        raise root.error("hold", f"state and action must name the same joints; only in one of them: {odd}")


def _check_command_layout(spec: RobotSpec, root: Section) -> None:
    """Every value of a command array has one owner: holes would be sent as zeros, overlaps as luck."""
    arrays: dict[tuple[str, str], list[Block]] = {}
    for block in (*spec.action, *spec.hold_action):
        arrays.setdefault((block.stream, block.path.dotted), []).append(block)
    for (stream, field), blocks in arrays.items():
        named = [b for b in blocks if b.names_path is not None]
        if named and len(named) != len(blocks):
            raise root.error("action", f"{stream}.{field} is written by name and by position; choose one")
        wire = Counter(n for b in named for n in b.wire_names)
        if wire and max(wire.values()) > 1:
            raise root.error(
                "action", f"{stream}.{field}: the name '{wire.most_common(1)[0][0]}' is written twice"
            )
        owner: dict[int, Block] = {}
        for block in blocks:
            if block.path.start is None or block.path.stop is None:
                continue
            for index in range(block.path.start, block.path.stop):
                if index in owner:
                    raise root.error("action", f"{stream}.{field}[{index}] is written by two blocks")
                owner[index] = block
        holes = sorted(set(range(max(owner, default=-1) + 1)) - set(owner))
        if holes:
            hint = "name the joints under 'hold' if they should keep their pose"
            raise root.error("action", f"{stream}.{field}[{holes[0]}] is written by no block; {hint}")


def _check_references(spec: RobotSpec, root: Section) -> None:
    action = set(spec.action_names)
    if spec.gap_rule is not None:
        rule = spec.gap_rule
        if rule.joint not in spec.joints:
            raise root.error("gap_rule", f"the joint '{rule.joint}' is not under 'joints'")
        if rule.stream not in spec.outputs:
            raise root.error("gap_rule", f"'{rule.stream}' is no outgoing stream")
    for stream in spec.streams.values():
        if stream.gate is not None and stream.gate.joint not in action:
            raise root.error("streams", f"{stream.name}: the gate's joint '{stream.gate.joint}' is no action")
        if stream.gate is not None and stream.direction != "out":
            raise root.error("streams", f"{stream.name}: only an outgoing stream can have a gate")
    groups = {j.group for j in spec.joints.values()}
    for profile, caps in spec.limit_profiles.items():
        unknown = sorted(set(caps) - groups)
        if unknown:
            raise root.error("limit_profiles", f"{profile}: there is no group '{unknown[0]}'")


__all__ = ["SpecError", "check_consistency"]
