"""The Kuavo's upper body in a small Gazebo world (SDF), from the same numbers as the MuJoCo model.

Made of simple shapes: two arms under Gazebo's joint position controllers with the robot's own gains, fingers
that slide from open (0) to closed, a head at a fixed pitch, three cameras, a table with a parcel. The base
stands still. Arms feel no gravity: on the robot, its whole-body controller carries them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.nodes.gazebo_mapping import MODEL, WORLD, gazebo_topic
from kuavo_smolvla_ros.robot.description import Block, RobotSpec
from kuavo_smolvla_ros.sim import kuavo

SDF_VERSION = "1.9"  # what Gazebo Fortress to Jetty read
HEAD_PITCH_RAD = math.radians(12)  # as in the contest's tasks 1 to 3
FINGER_TRAVEL_M = kuavo.GRIPPER_OPENING_M / 2
FINGER_MASS_KG = 0.05
FINGER_KP, FINGER_KD, FINGER_FORCE_N = 1500.0, 60.0, 20.0
AXES = {"x": (1, 0, 0), "y": (0, 1, 0), "z": (0, 0, 1)}
WHITE, DARK, ACCENT, WOOD = (0.85, 0.86, 0.88), (0.16, 0.17, 0.19), (0.18, 0.42, 0.72), (0.55, 0.42, 0.3)
SYSTEMS = (
    ("gz-sim-physics-system", "gz::sim::systems::Physics"),
    ("gz-sim-user-commands-system", "gz::sim::systems::UserCommands"),
    ("gz-sim-scene-broadcaster-system", "gz::sim::systems::SceneBroadcaster"),
)
CAMERAS = {
    # By role: its link, its place there, its attitude (MuJoCo's: looks along -z, y up), vertical angle.
    "head_cam_h": ("head", kuavo.HEAD_CAMERA_POSITION, kuavo.HEAD_CAMERA_QUAT, kuavo.HEAD_CAMERA_FOVY_DEG),
    "wrist_cam_l": (
        "zarm_l7_link",
        (0.0, kuavo.WRIST_CAMERA_OFFSET_M, 0.0),
        (1.0, 0.0, 0.0, 0.0),
        kuavo.WRIST_CAMERA_FOVY_DEG,
    ),
    "wrist_cam_r": (
        "zarm_r7_link",
        (0.0, -kuavo.WRIST_CAMERA_OFFSET_M, 0.0),
        (0.0, 0.0, 0.0, 1.0),
        kuavo.WRIST_CAMERA_FOVY_DEG,
    ),
}
Node = ElementTree.Element
Triple = tuple[float, float, float]


def world(spec: RobotSpec) -> str:
    """The whole file."""
    root = Node("sdf", version=SDF_VERSION)
    there = _add(root, "world", name=WORLD)
    physics = _add(there, "physics", name="500hz", type="ignored")
    _add(physics, "max_step_size", kuavo.PHYSICS_PERIOD_S)
    _add(physics, "real_time_factor", 1.0)
    for filename, name in SYSTEMS:
        _add(there, "plugin", filename=filename, name=name)
    sensors = _add(there, "plugin", filename="gz-sim-sensors-system", name="gz::sim::systems::Sensors")
    _add(sensors, "render_engine", "ogre2")
    _add_light(there)
    _add_thing(there, "ground", (0, 0, -0.05), (10, 10, 0.1), WHITE)
    _add_thing(there, "table", (0.62, 0.0, 0.4), (0.8, 1.6, 0.8), WOOD)
    _add_thing(there, "parcel", (0.45, 0.2, 0.86), (0.08, 0.08, 0.12), ACCENT, mass_kg=0.2)
    _add_robot(there, spec)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    made = "Written by: python -m kuavo_smolvla_ros.nodes.gazebo_files"
    return f'<?xml version="1.0"?>\n<!-- {made} -->\n{text}\n'


def _add(parent: Node, tag: str, value: object = None, **attributes: str) -> Node:
    child = ElementTree.SubElement(parent, tag, attributes)
    if isinstance(value, (bool, np.bool_)):
        child.text = "true" if value else "false"
    elif isinstance(value, (int, float)):
        child.text = _number(value)
    elif isinstance(value, str):
        child.text = value
    elif value is not None:
        assert isinstance(value, Iterable)
        child.text = " ".join(_number(v) for v in value)
    return child


def _number(value: float) -> str:
    return f"{value + 0.0:.9g}"  # + 0.0: no negative zero


def _add_light(there: Node) -> None:
    light = _add(there, "light", name="sun", type="directional")
    _add(light, "pose", (0, 0, 10, 0, 0, 0))
    _add(light, "cast_shadows", False)
    _add(light, "diffuse", (0.9, 0.9, 0.9, 1))
    _add(light, "direction", (-0.3, 0.2, -1))


def _add_thing(
    there: Node, name: str, position: Triple, size: Triple, colour: Triple, mass_kg: float | None = None
) -> None:
    """A box: part of the room, or with a mass, something to be moved."""
    model = _add(there, "model", name=name)
    _add(model, "static", mass_kg is None)
    _add(model, "pose", (*position, 0, 0, 0))
    link = _add(model, "link", name="link")
    if mass_kg is not None:
        x, y, z = (s**2 for s in size)
        _add_inertial(link, mass_kg, (0, 0, 0), tuple(mass_kg / 12 * s for s in (y + z, x + z, x + y)))
    for kind in ("visual", "collision"):
        _add_box(link, kind, "box", (0, 0, 0), size, colour)


def _add_inertial(link: Node, mass_kg: float, com: Triple, diagonal: tuple[float, ...]) -> None:
    inertial = _add(link, "inertial")
    _add(inertial, "pose", (*com, 0, 0, 0))
    _add(inertial, "mass", mass_kg)
    inertia = _add(inertial, "inertia")
    for name, value in zip(("ixx", "iyy", "izz"), diagonal, strict=True):
        _add(inertia, name, value)
    for name in ("ixy", "ixz", "iyz"):
        _add(inertia, name, 0)


def _shape(link: Node, kind: str, name: str, position: Triple, colour: Triple) -> Node:
    part = _add(link, kind, name=f"{name}_{kind}")
    _add(part, "pose", (*position, 0, 0, 0))
    if kind == "visual":
        material = _add(part, "material")
        _add(material, "ambient", (*colour, 1))
        _add(material, "diffuse", (*colour, 1))
    return _add(part, "geometry")


def _add_box(link: Node, kind: str, name: str, position: Triple, size: Triple, colour: Triple) -> None:
    _add(_add(_shape(link, kind, name, position, colour), "box"), "size", size)


def _add_capsule(
    link: Node, kind: str, name: str, z: float, radius: float, length: float, colour: Triple
) -> None:
    capsule = _add(_shape(link, kind, name, (0, 0, z), colour), "capsule")
    _add(capsule, "radius", radius)
    _add(capsule, "length", length)


def _add_robot(there: Node, spec: RobotSpec) -> None:
    model = _add(there, "model", name=MODEL)
    _add(model, "pose", (0, 0, kuavo.STANDING_HEIGHT_M, 0, 0, 0))
    base = _add(model, "link", name="base")
    _add_inertial(base, kuavo.BASE_MASS_KG, kuavo.BASE_COM, (0.7, 0.6, 0.3))
    for kind in ("visual", "collision"):
        _add_box(base, kind, "torso", (-0.0185, 0, 0.27), (0.16, 0.28, 0.48), WHITE)
    _add_box(base, "visual", "shoulders", (-0.0185, 0, 0.4245), (0.12, 0.44, 0.1), WHITE)
    for name, y in (("left_leg", 0.1), ("right_leg", -0.1)):
        leg = _shape(base, "visual", name, (0, y, -0.42), DARK)
        cylinder = _add(leg, "cylinder")
        _add(cylinder, "radius", 0.06)
        _add(cylinder, "length", 0.84)
    _add_joint(model, "standing", "fixed", "world", "base")
    _add_head(model)
    for side in kuavo.SIDES:
        _add_arm(model, side)
        _add_gripper(model, side)
    for role, camera in spec.cameras.items():
        stream = spec.streams[camera.stream]
        _add_camera(model, role, gazebo_topic(stream), stream.rate_hz, camera.width, camera.height)
    _add_controllers(model, spec)


def _add_joint(
    model: Node,
    name: str,
    kind: str,
    parent: str,
    child: str,
    offset: Triple | None = None,
    rpy: Triple = (0, 0, 0),
) -> Node:
    joint = _add(model, "joint", name=name, type=kind)
    if offset is not None:
        _add(joint, "pose", (*offset, *rpy), relative_to=parent)
    _add(joint, "parent", parent)
    _add(joint, "child", child)
    return joint


def _add_axis(
    joint: Node, xyz: Triple, lower: float, upper: float, effort: float, velocity: float, damping: float
) -> None:
    axis = _add(joint, "axis")
    _add(axis, "xyz", xyz)
    limit = _add(axis, "limit")
    for name, value in (("lower", lower), ("upper", upper), ("effort", effort), ("velocity", velocity)):
        _add(limit, name, value)
    _add(_add(axis, "dynamics"), "damping", damping)


def _add_link(model: Node, name: str, joint: str) -> Node:
    """A link that lies where its joint is, and is carried."""
    link = _add(model, "link", name=name)
    _add(link, "pose", (0, 0, 0, 0, 0, 0), relative_to=joint)
    _add(link, "gravity", False)
    return link


def _add_head(model: Node) -> None:
    link = _add_link(model, "head", "neck")
    _add_inertial(link, 1.2, (0, 0, 0.09), (0.006, 0.006, 0.005))
    _add_box(link, "visual", "head", (0, 0, 0.09), (0.14, 0.16, 0.18), WHITE)
    _add_joint(model, "neck", "fixed", "base", "head", kuavo.HEAD_POSITION, (0, HEAD_PITCH_RAD, 0))


def _add_arm(model: Node, side: str) -> None:
    parent = "base"
    for number, (name, facts) in enumerate(
        zip(kuavo.arm_joint_names(side), kuavo.ARMS[side], strict=True), start=1
    ):
        child = name.replace("_joint", "_link")
        link = _add_link(model, child, name)
        radius, length = 0.04, max(2 * abs(facts.com[2]), 0.06)
        across = facts.mass_kg * (3 * radius**2 + length**2) / 12
        _add_inertial(link, facts.mass_kg, facts.com, (across, across, facts.mass_kg * radius**2 / 2))
        if number == 3:
            _add_capsule(link, "visual", "upper_arm", -0.145, 0.048, 0.19, WHITE)
        if number == 5:
            for kind in ("visual", "collision"):
                _add_capsule(link, kind, "forearm", 0.005, 0.04, 0.15, WHITE)
        joint = _add_joint(model, name, "revolute", parent, child, facts.offset)
        _add_axis(joint, AXES[facts.axis], facts.lower, facts.upper, facts.effort_nm, facts.velocity, 0.2)
        parent = child


def _add_gripper(model: Node, side: str) -> None:
    """A palm as part of link 7's place, and two fingers that slide along its x towards each other."""
    hand = f"zarm_{side[0]}7_link"
    palm = _add_link(model, f"{side}_palm", f"{side}_wrist")
    palm_kg = kuavo.GRIPPER_MASS_KG - 2 * FINGER_MASS_KG
    _add_inertial(palm, palm_kg, (0, 0, 0), (4e-4, 5e-4, 4e-4))
    for kind in ("visual", "collision"):
        _add_box(palm, kind, "palm", (0, 0, 0), (0.072, 0.032, 0.06), DARK)
    _add_joint(model, f"{side}_wrist", "fixed", hand, f"{side}_palm", (0, 0, -0.055))
    for letter, outwards in (("a", 1.0), ("b", -1.0)):
        name = f"{side}_finger_{letter}"
        finger = _add_link(model, f"{name}_link", name)
        _add_inertial(finger, FINGER_MASS_KG, (0, 0, 0), (5e-5, 5e-5, 1e-5))
        for kind in ("visual", "collision"):
            _add_box(finger, kind, "pad", (outwards * 0.004, 0, 0.02), (0.008, 0.022, 0.078), ACCENT)
        at = (outwards * FINGER_TRAVEL_M, 0.0, -kuavo.PINCH_BELOW_L7_M)
        joint = _add_joint(model, name, "prismatic", hand, f"{name}_link", at)
        speed = kuavo.GRIPPER_VELOCITY_PER_S * FINGER_TRAVEL_M
        _add_axis(joint, (-outwards, 0, 0), 0.0, FINGER_TRAVEL_M, FINGER_FORCE_N, speed, 5.0)


def _add_camera(model: Node, role: str, topic: str, rate_hz: float, width: int, height: int) -> None:
    link_name, position, quat, fovy_deg = CAMERAS[role]
    (link,) = (link for link in model.iter("link") if link.get("name") == link_name)
    sensor = _add(link, "sensor", name=role, type="camera")
    _add(sensor, "pose", (*position, *_camera_rpy(quat)))
    _add(sensor, "topic", topic)
    _add(sensor, "update_rate", rate_hz)
    _add(sensor, "always_on", True)
    camera = _add(sensor, "camera")
    _add(camera, "horizontal_fov", 2 * math.atan(math.tan(math.radians(fovy_deg) / 2) * width / height))
    image = _add(camera, "image")
    _add(image, "width", width)
    _add(image, "height", height)
    _add(image, "format", "R8G8B8")
    clip = _add(camera, "clip")
    _add(clip, "near", 0.01)
    _add(clip, "far", 20)


def _camera_rpy(quat: tuple[float, float, float, float]) -> Triple:
    """MuJoCo's cameras look along -z with y up; Gazebo's along x with z up."""
    m = _matrix(quat)
    r = np.column_stack([-m[:, 2], -m[:, 0], m[:, 1]])
    pitch = math.asin(float(np.clip(-r[2, 0], -1, 1)))
    if abs(r[2, 0]) > 1 - 1e-9:  # straight down: roll and yaw turn about the same line
        return 0.0, pitch, math.atan2(-float(r[0, 1]), float(r[1, 1]))
    return math.atan2(float(r[2, 1]), float(r[2, 2])), pitch, math.atan2(float(r[1, 0]), float(r[0, 0]))


def _matrix(quat: tuple[float, float, float, float]) -> NDArray[np.float64]:
    w, x, y, z = np.array(quat) / np.linalg.norm(quat)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _add_controllers(model: Node, spec: RobotSpec) -> None:
    """Gazebo's own: all joints are told, and each command topic drives the joints it is for."""
    states = _add(
        model,
        "plugin",
        filename="gz-sim-joint-state-publisher-system",
        name="gz::sim::systems::JointStatePublisher",
    )
    for joint in model.iter("joint"):
        if joint.get("type") != "fixed":
            _add(states, "joint_name", str(joint.get("name")))
    efforts = {
        name: facts.effort_nm
        for side in kuavo.SIDES
        for name, facts in zip(kuavo.arm_joint_names(side), kuavo.ARMS[side], strict=True)
    }
    for block in spec.action:
        joints, gains = _driven(block, efforts)
        plugin = _add(
            model,
            "plugin",
            filename="gz-sim-joint-position-controller-system",
            name="gz::sim::systems::JointPositionController",
        )
        for joint in joints:
            _add(plugin, "joint_name", joint)
        _add(plugin, "topic", gazebo_topic(spec.streams[block.stream]))
        p, d, limit = gains
        for name, value in (("p_gain", p), ("i_gain", 0), ("d_gain", d), ("cmd_max", limit)):
            _add(plugin, name, value)
        _add(plugin, "cmd_min", -limit)


def _driven(block: Block, efforts: dict[str, float]) -> tuple[tuple[str, ...], Triple]:
    """The joints of the world that one number of the action moves, and their servo's p, d and limit."""
    (name,) = block.joints
    if name in efforts:
        return (name,), (kuavo.ARM_KP, kuavo.ARM_KD, efforts[name])
    side = name.removesuffix("_gripper")
    return (f"{side}_finger_a", f"{side}_finger_b"), (FINGER_KP, FINGER_KD, FINGER_FORCE_N)
