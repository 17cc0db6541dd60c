"""Pieces a task's scene is made of: tables, belts, markers, loose bodies. World frame: robot at the
origin, +x ahead."""

from __future__ import annotations

from collections.abc import Sequence

import mujoco

from kuavo_smolvla_ros.sim.model import ALL_BITS, SCENE_BIT

BOX, CYLINDER = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER
SOLID = {"contype": SCENE_BIT, "conaffinity": ALL_BITS}
SHOWN = {"contype": 0, "conaffinity": 0, "mass": 0}
SURFACE_FRICTION = [0.8, 0.005, 0.0001]
ROOM_M = 4.0  # half its width
FLOOR, WALL, CEILING = [0.53, 0.55, 0.58, 1], [0.70, 0.72, 0.74, 1], [0.80, 0.82, 0.84, 1]
WOOD, RUBBER, STEEL = [0.74, 0.62, 0.47, 1], [0.22, 0.24, 0.24, 1], [0.62, 0.64, 0.67, 1]


def add_room(spec: mujoco.MjSpec) -> None:
    """A floor (nothing falls that far and is still of use), walls, a ceiling, two lights without shadows.

    Each of one colour: without a GPU a textured floor and sky cost more than all else in a picture.
    """
    spec.worldbody.add_geom(
        name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[ROOM_M, ROOM_M, 0.1], rgba=FLOOR, **SOLID
    )
    top = ROOM_M / 2
    walls = [([x * ROOM_M, 0, top], [0.01, ROOM_M, top]) for x in (-1, 1)]
    walls += [([0, y * ROOM_M, top], [ROOM_M, 0.01, top]) for y in (-1, 1)]
    for centre, half in walls:
        spec.worldbody.add_geom(type=BOX, pos=centre, size=half, rgba=WALL, **SHOWN)
    spec.worldbody.add_geom(type=BOX, pos=[0, 0, 2 * top], size=[ROOM_M, ROOM_M, 0.01], rgba=CEILING, **SHOWN)
    for name, position in (("key_light", [0.2, -1.5, 2.6]), ("fill_light", [-0.5, 1.5, 2.4])):
        light = spec.worldbody.add_light(name=name, pos=position, castshadow=False)
        light.dir = [0.6 - position[0], -position[1], 0.9 - position[2]]
        light.diffuse, light.specular = [0.35, 0.35, 0.34], [0.05, 0.05, 0.05]


def add_table(
    spec: mujoco.MjSpec,
    name: str,
    centre: Sequence[float],
    half: Sequence[float],
    rgba: Sequence[float] = WOOD,
) -> None:
    """A table whose board has the given centre and half size; the legs are only to look at."""
    spec.worldbody.add_geom(
        name=name,
        type=BOX,
        pos=list(centre),
        size=list(half),
        rgba=list(rgba),
        friction=SURFACE_FRICTION,
        **SOLID,
    )
    leg_half = (centre[2] - half[2]) / 2
    for sx in (-1, 1):
        for sy in (-1, 1):
            at = [centre[0] + sx * (half[0] - 0.03), centre[1] + sy * (half[1] - 0.03), leg_half]
            spec.worldbody.add_geom(type=BOX, pos=at, size=[0.025, 0.025, leg_half], rgba=STEEL, **SHOWN)


def add_belt(
    spec: mujoco.MjSpec,
    name: str,
    centre: Sequence[float],
    half: Sequence[float],
    velocity: Sequence[float],
) -> None:
    """A conveyor: a slab whose surface moves, so what lies on it is carried by friction."""
    spec.worldbody.add_geom(
        name=name,
        type=BOX,
        pos=list(centre),
        size=list(half),
        rgba=RUBBER,
        friction=[1.0, 0.005, 0.0001],
        surfacevel=[*velocity, 0, 0, 0],
        **SOLID,
    )
    along_x = abs(velocity[0]) > abs(velocity[1])
    rail_half = [half[0], 0.012, half[2]] if along_x else [0.012, half[1], half[2]]
    for sign in (-1, 1):
        at = list(centre)
        at[1 if along_x else 0] += sign * ((half[1] if along_x else half[0]) + 0.012)
        spec.worldbody.add_geom(type=BOX, pos=at, size=rail_half, rgba=STEEL, **SHOWN)
    foot = [0.8 * half[0], 0.8 * half[1], (centre[2] - half[2]) / 2]
    spec.worldbody.add_geom(
        type=BOX, pos=[centre[0], centre[1], foot[2]], size=foot, rgba=[0.45, 0.47, 0.5, 1], **SHOWN
    )


def add_marker(spec: mujoco.MjSpec, name: str, side_m: float, rgba: Sequence[float]) -> mujoco.MjsBody:
    """A coloured square lying on a table: seen, never felt. It is a mocap body, so a task may put it
    anywhere."""
    body = spec.worldbody.add_body(name=name, mocap=True)
    body.add_geom(type=BOX, size=[side_m / 2, side_m / 2, 0.0006], rgba=list(rgba), **SHOWN)
    return body


def add_fixture(spec: mujoco.MjSpec, name: str) -> mujoco.MjsBody:
    """An empty mocap body for things that stand still during an episode but not at the same place in each."""
    return spec.worldbody.add_body(name=name, mocap=True)


def add_loose(spec: mujoco.MjSpec, name: str) -> mujoco.MjsBody:
    """An empty body that moves freely; give it geoms with SOLID contact bits and a mass."""
    body = spec.worldbody.add_body(name=name)
    body.add_freejoint(name=name)
    return body
