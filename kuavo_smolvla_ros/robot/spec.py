"""`load_spec`: a YAML file under config/robot becomes a checked `RobotSpec`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.robot.consistency import check_consistency
from kuavo_smolvla_ros.robot.description import (
    VALUE,
    Block,
    Camera,
    Condition,
    GapRule,
    Gate,
    Joint,
    RobotSpec,
    Signal,
    Stream,
)
from kuavo_smolvla_ros.robot.fields import FieldPath
from kuavo_smolvla_ros.robot.units import UNITS, VECTOR_UNITS, Unit
from kuavo_smolvla_ros.robot.yaml_file import Section, SpecError, open_yaml, plain

__all__ = ["RobotSpec", "SpecError", "load_spec", "spec_names"]


def spec_names() -> list[str]:
    """Robot descriptions shipped with the package."""
    return sorted(p.stem for p in (config_dir() / "robot").glob("*.yaml") if not p.stem.startswith("_"))


def load_spec(name_or_path: str | Path, limit_profile: str | None = None) -> RobotSpec:
    """Load `kuavo_sim` (a name under config/robot) or a path to a YAML file."""
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else config_dir() / "robot" / f"{text}.yaml"
    if not path.is_file():
        raise SpecError(
            f"there is no robot description '{text}'; shipped are {', '.join(spec_names())}, or give a path"
        )
    root = open_yaml(path)
    spec = _read_spec(root)
    check_consistency(spec, root)
    if limit_profile is not None:
        try:
            spec = spec.with_limit_profile(limit_profile)
        except KeyError as error:
            raise SpecError(f"{path.name}: {error.args[0]}") from None
    return spec


def _read_spec(root: Section) -> RobotSpec:
    joints = {name: _read_joint(name, s) for name, s in root.section("joints").children()}
    streams = {name: _read_stream(name, s) for name, s in root.section("streams").children()}
    profiles = {
        name: {group: _read_caps(caps) for group, caps in section.children()}
        for name, section in (root.section("limit_profiles").children() if "limit_profiles" in root else ())
    }
    reader = _BlockReader(joints)
    hold = root.section("hold") if "hold" in root else None
    spec = RobotSpec(
        name=root.text("name"),
        fps=root.number("fps", above=0),
        command_rate_hz=root.number("command_rate_hz", above=0),
        max_skew_s=root.number("max_skew_s", above=0),
        joints=joints,
        streams=streams,
        cameras={name: _read_camera(name, s) for name, s in root.section("cameras").children()},
        state=tuple(reader.read(s) for s in root.sections("state")),
        action=tuple(reader.read(s) for s in root.sections("action")),
        hold_state=tuple(reader.read(s) for s in hold.sections("state")) if hold else (),
        hold_action=tuple(reader.read(s) for s in hold.sections("action")) if hold else (),
        gap_rule=_read_gap_rule(root.section("gap_rule")) if "gap_rule" in root else None,
        poses=_read_poses(root, joints),
        preconditions=tuple(_read_condition(s) for s in root.sections("preconditions"))
        if "preconditions" in root
        else (),
        signals={name: _read_signal(name, s) for name, s in root.section("signals").children()}
        if "signals" in root
        else {},
        limit_profiles=profiles,
        limit_profile=root.text("limit_profile", ("hardware", *profiles))
        if "limit_profile" in root
        else "hardware",
    )
    if hold:
        hold.close()
    root.close()
    return spec


def _read_joint(name: str, section: Section) -> Joint:
    joint = Joint(
        name=name,
        group=section.text("group"),
        unit=section.text("unit", VECTOR_UNITS),
        lower=section.number("lower"),
        upper=section.number("upper"),
        velocity=section.number("velocity", above=0, infinite=True),
        acceleration=section.number("acceleration", above=0, infinite=True),
    )
    section.close()
    if joint.lower >= joint.upper:
        raise section.error("lower", f"{joint.lower:g} is not below upper {joint.upper:g}")
    return joint


def _read_caps(section: Section) -> tuple[float, float]:
    caps = (section.number("velocity", above=0), section.number("acceleration", above=0))
    section.close()
    return caps


def _read_stream(name: str, section: Section) -> Stream:
    direction = section.text("direction", ("in", "out"))
    gate = None
    if "gate" in section:
        gate_section = section.section("gate")
        gate = Gate(
            joint=gate_section.text("joint"),
            above=gate_section.number("above") if "above" in gate_section else None,
            at_most=gate_section.number("at_most") if "at_most" in gate_section else None,
        )
        gate_section.close()
        if (gate.above is None) == (gate.at_most is None):
            raise section.error("gate", "needs exactly one of 'above' and 'at_most'")
    stream = Stream(
        name=name,
        topic=section.text("topic"),
        type=section.text("type"),
        direction="in" if direction == "in" else "out",
        rate_hz=section.number("rate_hz", above=0),
        max_age_s=section.number("max_age_s", above=0, infinite=direction == "out"),
        stamp="receive"
        if "stamp" in section and section.text("stamp", ("header", "receive")) == "receive"
        else "header",
        constants=plain(section.take("constants")) if "constants" in section else {},
        gate=gate,
    )
    section.close()
    if not stream.topic.startswith("/"):
        raise section.error("topic", f"'{stream.topic}' must be absolute, starting with /")
    if len(stream.type.split("/")) != 3 or stream.type.split("/")[1] != "msg":
        raise section.error("type", f"'{stream.type}' must look like sensor_msgs/msg/JointState")
    for path in stream.constants:
        _path(section, "constants", path)
    return stream


def _read_camera(name: str, section: Section) -> Camera:
    camera = Camera(name, section.text("stream"), section.whole("height"), section.whole("width"))
    section.close()
    return camera


def _read_gap_rule(section: Section) -> GapRule:
    rule = GapRule(section.text("joint"), section.text("stream"), section.number("longer_than_s", above=0))
    section.close()
    return rule


def _read_condition(section: Section) -> Condition:
    equals: Any = section.take("equals")
    if isinstance(equals, bool) or not isinstance(equals, (int, float, str)):
        raise section.error("equals", f"{equals!r} is neither a number nor text")
    condition = Condition(
        name=section.text("name"),
        topic=section.text("topic"),
        type=section.text("type"),
        path=_path(section, "field", section.text("field")),
        equals=equals if isinstance(equals, str) else float(equals),
        hint=section.text("hint"),
    )
    section.close()
    return condition


def _read_signal(name: str, section: Section) -> Signal:
    signal = Signal(name, section.text("topic"), section.text("type"))
    section.close()
    return signal


def _read_poses(root: Section, joints: dict[str, Joint]) -> dict[str, dict[str, float]]:
    """Each pose lists values by group, arms in the pose's `unit`, other groups in the vector's own unit."""
    poses: dict[str, dict[str, float]] = {}
    if "poses" not in root:
        return poses
    for name, section in root.section("poses").children():
        unit = UNITS[section.text("unit", ("rad", "deg"))]
        pose: dict[str, float] = {}
        for group in dict.fromkeys(j.group for j in joints.values()):
            if group not in section:
                continue
            members = [j for j in joints.values() if j.group == group]
            values = section.numbers(group)
            if len(values) != len(members):
                raise section.error(group, f"{len(values)} values for {len(members)} joints")
            for joint, value in zip(members, values, strict=True):
                in_vector = (value - unit.offset) / unit.scale if joint.unit == "rad" else value
                if not joint.lower - 1e-9 <= in_vector <= joint.upper + 1e-9:
                    bounds = f"{joint.lower:.4f}..{joint.upper:.4f}"
                    raise section.error(
                        group, f"{joint.name} = {in_vector:.4f} {joint.unit} lies outside {bounds}"
                    )
                pose[joint.name] = min(max(in_vector, joint.lower), joint.upper)
        section.close()
        poses[name] = pose
    return poses


class _BlockReader:
    def __init__(self, joints: dict[str, Joint]) -> None:
        self._joints = joints

    def read(self, section: Section) -> Block:
        names = self._joint_names(section)
        unit = self._unit(section, names)
        path = _path(section, "field", section.text("field"))
        names_path = (
            _path(section, "names_field", section.text("names_field")) if "names_field" in section else None
        )
        wire_names: tuple[str, ...] = ()
        if names_path is not None:
            wire_names = section.texts("wire_names") if "wire_names" in section else names
        block = Block(
            joints=names,
            stream=section.text("stream"),
            path=path,
            unit=unit,
            names_path=names_path,
            wire_names=wire_names,
            spread=self._spread(section) if "spread" in section else (),
        )
        section.close()
        _check_width(block, section)
        return block

    def _joint_names(self, section: Section) -> tuple[str, ...]:
        value = section.take("joints")
        if isinstance(value, str):
            group = tuple(j.name for j in self._joints.values() if j.group == value)
            if not group:
                groups = ", ".join(dict.fromkeys(j.group for j in self._joints.values()))
                raise section.error("joints", f"there is no group '{value}'; groups are {groups}")
            return group
        names = section.texts("joints")
        for name in names:
            if name not in self._joints:
                raise section.error("joints", f"the joint '{name}' is not under 'joints'")
        return names

    def _unit(self, section: Section, names: tuple[str, ...]) -> Unit:
        vector_units = {self._joints[n].unit for n in names}
        if len(vector_units) > 1:
            raise section.error("joints", f"one block cannot mix {', '.join(sorted(vector_units))}")
        (vector_unit,) = vector_units
        if "unit" not in section:
            return UNITS[vector_unit]
        value = section.take("unit")
        if isinstance(value, str):
            if value not in UNITS:
                raise section.error(
                    "unit", f"the unit '{value}' is unknown; known are {', '.join(UNITS)} or scale/offset"
                )
            unit = UNITS[value]
            if unit.vector_unit != vector_unit:
                raise section.error(
                    "unit", f"'{value}' translates to {unit.vector_unit}, the joints are in {vector_unit}"
                )
            return unit
        custom = section.section("unit")
        scale = custom.number("scale")
        offset = custom.number("offset") if "offset" in custom else 0.0
        custom.close()
        if scale == 0:
            raise custom.error("scale", "0 cannot be inverted")
        return Unit(f"x{scale:g}+{offset:g}", vector_unit, scale, offset)

    def _spread(self, section: Section) -> tuple[float | str, ...]:
        value = section.take("spread")
        good = isinstance(value, list) and all(
            v == VALUE or (isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v))
            for v in value
        )
        if not good or VALUE not in value:
            raise section.error("spread", f"must be a list of numbers and the word '{VALUE}', at least once")
        return tuple(v if isinstance(v, str) else float(v) for v in value)


def _check_width(block: Block, section: Section) -> None:
    wanted = len(block.joints)
    if block.names_path is not None:
        if len(block.wire_names) != wanted:
            raise section.error("wire_names", f"{len(block.wire_names)} names for {wanted} joints")
        if block.path.width is not None or block.spread:
            raise section.error("field", "values found by name take a whole field: no slice, no spread")
        return
    if block.spread:
        if wanted != 1:
            raise section.error("spread", f"spreads one joint, the block has {wanted}")
        wanted = len(block.spread)
    width = block.path.width
    if width is None and wanted != 1:
        raise section.error(
            "field", f"needs a slice of {wanted} values, for example {block.path}[0:{wanted}]"
        )
    if width is not None and width != wanted:
        raise section.error("field", f"'{block.path}' is {width} wide, the joints need {wanted}")


def _path(section: Section, key: str, text: str) -> FieldPath:
    try:
        return FieldPath.parse(text)
    except ValueError as error:
        raise section.error(key, str(error)) from None
