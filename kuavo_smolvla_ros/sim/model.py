"""The robot as a MuJoCo model: two position-controlled arms, two parallel grippers, head and wrist cameras.

The contest's robot has torque motors under a whole-body controller and a linkage gripper. Here a stiff
position servo with the robot's own gains and gravity compensation stands for the controller, and two
coupled slide fingers with the same opening and pinch point stand for the linkage. Legs are left out: they
stand still in tasks 1 to 3, and in task 4 the base follows pose commands on slides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import LARGEST

AXES = {"x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0, 1]}
# Contact bits: everything touches the scene, the two arms touch each other, an arm does not touch itself.
SCENE_BIT = 1
ARM_BIT = {"left": 2, "right": 4}
ALL_BITS = 7
PAD_FRICTION = [1.0, 0.02, 0.0001]
STIFF_SOLREF = [0.01, 1.0]
FINGER_KP = 1500.0
FINGER_KD = 60.0
FINGER_FORCE_N = 20.0
PAD_HALF = (0.004, 0.011, 0.0095)
WHITE, DARK, ACCENT = [0.85, 0.86, 0.88, 1], [0.16, 0.17, 0.19, 1], [0.18, 0.42, 0.72, 1]


def new_spec() -> mujoco.MjSpec:
    """An empty world with the contest simulator's physics and rendering cheap enough to do without a GPU."""
    spec = mujoco.MjSpec()
    spec.modelname = "kuavo"
    spec.compiler.degree = False
    spec.compiler.autolimits = True
    option = spec.option
    option.timestep = kuavo.PHYSICS_PERIOD_S
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 10.0
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    # The last step's forces are a poor first guess for stiff servos: from the smooth motion the solver
    # reaches the same tolerance up to twice as fast, and a step depends on nothing but the state.
    option.disableflags = mujoco.mjtDisableBit.mjDSBL_WARMSTART
    visual = spec.visual
    visual.quality.offsamples = 0
    visual.quality.shadowsize = 1024
    # Round shapes in fewer facets: a quarter off the time of a small picture.
    visual.quality.numslices, visual.quality.numstacks = 16, 8
    visual.global_.offwidth, visual.global_.offheight = LARGEST[1], LARGEST[0]
    visual.map.znear, visual.map.zfar = 0.005, 20.0
    visual.headlight.ambient = [0.45, 0.45, 0.45]
    visual.headlight.diffuse = [0.25, 0.25, 0.25]
    visual.headlight.specular = [0.0, 0.0, 0.0]
    spec.stat.extent, spec.stat.center = 1.5, [0.4, 0.0, 0.9]
    return spec


def add_robot(
    spec: mujoco.MjSpec, *, mobile: bool, head_pitch_rad: float, sides: Sequence[str] = kuavo.SIDES
) -> None:
    """Put the robot at the world's origin, facing +x; `mobile` gives its base x, y and yaw."""
    base = spec.worldbody.add_body(name="base", pos=[0, 0, kuavo.STANDING_HEIGHT_M], gravcomp=1)
    base.mass, base.ipos = kuavo.BASE_MASS_KG, list(kuavo.BASE_COM)
    base.inertia, base.explicitinertial = [0.7, 0.6, 0.3], True
    if mobile:
        _add_base_joints(base)
    _add_torso(base)
    _add_head(base, head_pitch_rad)
    for side in sides:
        hand = _add_arm(base, side)
        _add_gripper(spec, hand, side)
    for side in sides:
        _add_arm_actuators(spec, side)
    if mobile:
        _add_base_actuators(spec)


def _add_base_joints(base: mujoco.MjsBody) -> None:
    slide, hinge = mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE
    for name, kind, axis in (("base_x", slide, "x"), ("base_y", slide, "y"), ("base_yaw", hinge, "z")):
        base.add_joint(name=name, type=kind, axis=AXES[axis], damping=[10.0, 0, 0])


def _add_torso(base: mujoco.MjsBody) -> None:
    box, capsule = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CAPSULE
    solid = {"contype": SCENE_BIT, "conaffinity": ALL_BITS, "mass": 0}
    base.add_geom(
        name="torso", type=box, pos=[-0.0185, 0, 0.27], size=[0.08, 0.14, 0.24], rgba=WHITE, **solid
    )
    shown = {"contype": 0, "conaffinity": 0, "mass": 0}
    base.add_geom(type=box, pos=[-0.0185, 0, 0.4245], size=[0.06, 0.22, 0.05], rgba=WHITE, **shown)
    for y in (-0.1, 0.1):
        base.add_geom(type=capsule, fromto=[0, y, 0, 0, y, -0.80], size=[0.06, 0, 0], rgba=DARK, **shown)


def _add_head(base: mujoco.MjsBody, pitch_rad: float) -> None:
    """The head keeps one pitch for a whole task, as the contest does, so it needs no joints."""
    quat = [math.cos(pitch_rad / 2), 0, math.sin(pitch_rad / 2), 0]
    head = base.add_body(name="head", pos=list(kuavo.HEAD_POSITION), quat=quat, gravcomp=1)
    box = mujoco.mjtGeom.mjGEOM_BOX
    shown = {"contype": 0, "conaffinity": 0, "mass": 0.4}
    head.add_geom(type=box, pos=[0.0, 0, 0.09], size=[0.07, 0.08, 0.09], rgba=WHITE, **shown)
    head.add_geom(type=box, pos=[0.07, 0, 0.1], size=[0.005, 0.07, 0.05], rgba=DARK, **shown)
    head.add_camera(
        name="head_cam_h",
        pos=list(kuavo.HEAD_CAMERA_POSITION),
        quat=list(kuavo.HEAD_CAMERA_QUAT),
        fovy=kuavo.HEAD_CAMERA_FOVY_DEG,
    )


def _add_arm(base: mujoco.MjsBody, side: str) -> mujoco.MjsBody:
    parent = base
    for number, joint in enumerate(kuavo.ARMS[side], start=1):
        name = f"zarm_{side[0]}{number}"
        body = parent.add_body(name=f"{name}_link", pos=list(joint.offset), gravcomp=1)
        radius, length = 0.04, max(2 * abs(joint.com[2]), 0.06)
        across = joint.mass_kg * (3 * radius**2 + length**2) / 12
        body.mass, body.ipos, body.explicitinertial = joint.mass_kg, list(joint.com), True
        body.inertia = [across, across, joint.mass_kg * radius**2 / 2]
        body.add_joint(
            name=f"{name}_joint",
            type=mujoco.mjtJoint.mjJNT_HINGE,
            axis=AXES[joint.axis],
            range=[joint.lower, joint.upper],
            damping=[0.2, 0, 0],
            armature=0.02,
        )
        _add_link_shape(body, side, number)
        parent = body
    return parent


def _add_link_shape(body: mujoco.MjsBody, side: str, number: int) -> None:
    """Only the forearm collides among these: shoulder and upper arm cannot reach anything but their own
    body."""
    capsule, sphere = mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE
    shown = {"contype": 0, "conaffinity": 0, "mass": 0}
    if number == 1:
        body.add_geom(type=sphere, size=[0.06, 0, 0], rgba=WHITE, **shown)
    elif number == 3:
        body.add_geom(
            type=capsule, fromto=[0, 0, -0.05, 0, 0, -0.24], size=[0.048, 0, 0], rgba=WHITE, **shown
        )
    elif number == 4:
        body.add_geom(type=sphere, pos=[-0.01, 0, 0], size=[0.05, 0, 0], rgba=DARK, **shown)
    elif number == 5:
        body.add_geom(
            name=f"{side}_forearm",
            type=capsule,
            fromto=[0, 0, 0.08, 0, 0, -0.07],
            size=[0.04, 0, 0],
            rgba=WHITE,
            **_solid(side),
        )
    elif number == 6:
        body.add_geom(type=sphere, size=[0.034, 0, 0], rgba=DARK, **shown)


def _solid(side: str) -> dict[str, float]:
    """Contact bits of an arm's geom; its mass is given by the body."""
    return {"contype": ARM_BIT[side], "conaffinity": ALL_BITS & ~ARM_BIT[side], "mass": 0}


def _add_gripper(spec: mujoco.MjSpec, hand: mujoco.MjsBody, side: str) -> None:
    """A palm below link 7 and two fingers that slide along its x; both together carry the gripper's mass."""
    box = mujoco.mjtGeom.mjGEOM_BOX
    finger_mass = 0.05
    palm_mass = kuavo.GRIPPER_MASS_KG - 2 * finger_mass
    palm = hand.add_body(name=f"{side}_palm", pos=[0, 0, -0.055], gravcomp=1)
    palm.add_geom(
        name=f"{side}_palm",
        type=box,
        size=[0.036, 0.016, 0.03],
        rgba=DARK,
        **(_solid(side) | {"mass": palm_mass}),
    )
    hand.add_site(name=f"{side}_pinch", pos=[0, 0, -kuavo.PINCH_BELOW_L7_M], size=[0.004, 0, 0], group=4)
    sign = 1 if side == "left" else -1
    hand.add_camera(
        name=f"wrist_cam_{side[0]}",
        pos=[0, sign * kuavo.WRIST_CAMERA_OFFSET_M, 0],
        # The right image is turned by half a turn, as on the robot.
        quat=[1, 0, 0, 0] if side == "left" else [0, 0, 0, 1],
        fovy=kuavo.WRIST_CAMERA_FOVY_DEG,
    )
    tendon = spec.add_tendon(name=f"{side}_gripper")
    for letter, direction in (("a", 1), ("b", -1)):
        name = f"{side}_finger_{letter}"
        finger = hand.add_body(name=name, pos=[0, 0, -kuavo.PINCH_BELOW_L7_M], gravcomp=1)
        finger.add_joint(
            name=name,
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[direction, 0, 0],
            range=[0.0, kuavo.GRIPPER_OPENING_M / 2],
            damping=[5.0, 0, 0],
            armature=0.05,
        )
        thickness, width, half_height = PAD_HALF
        for part, z in (("upper", half_height), ("lower", -half_height)):
            finger.add_geom(
                name=f"{name}_{part}_pad",
                type=box,
                pos=[direction * thickness, 0, z],
                size=list(PAD_HALF),
                condim=4,
                friction=PAD_FRICTION,
                solref=STIFF_SOLREF,
                priority=1,
                rgba=ACCENT,
                **(_solid(side) | {"mass": finger_mass / 4}),
            )
        finger.add_geom(
            name=f"{name}_link",
            type=box,
            pos=[direction * (2 * thickness + 0.006), 0, 0.028],
            size=[0.006, width, 0.045],
            rgba=DARK,
            **(_solid(side) | {"mass": finger_mass / 2}),
        )
        tendon.wrap_joint(name, 0.5)
    mirror = spec.add_equality(name1=f"{side}_finger_a", name2=f"{side}_finger_b", solref=[0.005, 1.0])
    mirror.type, mirror.objtype = mujoco.mjtEq.mjEQ_JOINT, mujoco.mjtObj.mjOBJ_JOINT
    mirror.data[:5] = [0, 1, 0, 0, 0]


def _add_position_servo(
    spec: mujoco.MjSpec, name: str, kind: mujoco.mjtTrn, target: str, kp: float, kd: float, force: float
) -> None:
    actuator = spec.add_actuator(name=name, trntype=kind, target=target)
    actuator.gaintype, actuator.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
    actuator.gainprm[0] = kp
    actuator.biasprm[1], actuator.biasprm[2] = -kp, -kd
    actuator.forcerange = [-force, force]


def _add_arm_actuators(spec: mujoco.MjSpec, side: str) -> None:
    joint, tendon = mujoco.mjtTrn.mjTRN_JOINT, mujoco.mjtTrn.mjTRN_TENDON
    for name, facts in zip(kuavo.arm_joint_names(side), kuavo.ARMS[side], strict=True):
        _add_position_servo(spec, name, joint, name, kuavo.ARM_KP, kuavo.ARM_KD, facts.effort_nm)
    gripper = f"{side}_gripper"
    _add_position_servo(spec, gripper, tendon, gripper, FINGER_KP, FINGER_KD, 2 * FINGER_FORCE_N)


def _add_base_actuators(spec: mujoco.MjSpec) -> None:
    """Stiff enough that the base follows its pose command whatever the arms do."""
    for name in ("base_x", "base_y", "base_yaw"):
        _add_position_servo(spec, name, mujoco.mjtTrn.mjTRN_JOINT, name, 40_000.0, 4_000.0, 20_000.0)
