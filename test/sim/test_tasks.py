"""Scores and success on constructed states, and where episodes start."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.sim.task import Level, TimeBonus, draw, tilt_rad
from kuavo_smolvla_ros.sim.tasks import TASKS, make_task
from kuavo_smolvla_ros.sim.tasks import belt_sorting as t1
from kuavo_smolvla_ros.sim.tasks import parcel_weighing as t2


def put(sim, body: str, position, tilt: float = 0.0) -> None:
    """Place a body, tilted about x, and let positions be known."""
    sim.put_loose(body, position, quat=[np.cos(tilt / 2), np.sin(tilt / 2), 0, 0])
    mujoco.mj_forward(sim.model, sim.data)


def on_marker(sim, marker: str, dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> np.ndarray:
    at = sim.position(marker)
    return np.array([at[0] + dx, at[1] + dy, t1.TABLE_TOP_M + t1.REST_HEIGHT_M + dz])


def test_every_part_of_every_score_starts_at_nothing(simulation):
    for number in TASKS:
        sim = simulation(number)
        assert sim.score().total == 0
        assert not sim.score().success


def test_task1_part_on_marker1_earns_place_and_upright(simulation):
    sim = simulation(1)
    put(sim, "part", on_marker(sim, "marker1"))
    assert sim.task.points(sim) == {
        "zone1_position": 30,
        "zone1_upright": 10,
        "zone2_position": 0,
        "zone2_upright": 0,
    }


@pytest.mark.parametrize(("level", "tolerance"), [("easy", 0.06), ("contest", 0.045)])
@pytest.mark.parametrize("axis", [0, 1])
def test_task1_tolerance_is_a_square(simulation, level, tolerance, axis):
    sim = simulation(1, level)
    for off, points in ((tolerance - 0.002, 30), (tolerance + 0.002, 0), (-tolerance - 0.002, 0)):
        shift = {0: {"dx": off}, 1: {"dy": off}}[axis]
        put(sim, "part", on_marker(sim, "marker2", **shift))
        assert sim.task.points(sim)["zone2_position"] == points


@pytest.mark.parametrize(("tilt_deg", "points"), [(0, 10), (9, 10), (11, 0), (180, 0), (-9, 10)])
def test_task1_upright_means_within_ten_degrees(simulation, tilt_deg, points):
    sim = simulation(1, "contest")
    put(sim, "part", on_marker(sim, "marker1"), tilt=np.deg2rad(tilt_deg))
    assert sim.task.points(sim)["zone1_upright"] == points


def test_task1_final_zone_wants_the_part_standing_not_held_above(simulation):
    sim = simulation(1, "contest")
    put(sim, "part", on_marker(sim, "marker2", dz=0.02))
    assert sim.task.points(sim)["zone2_position"] == 0
    put(sim, "part", on_marker(sim, "marker1", dz=-0.04))
    assert sim.task.points(sim)["zone1_position"] == 30
    assert t1.HEIGHTS_M["zone2"][0] < t1.TABLE_TOP_M + t1.REST_HEIGHT_M < t1.HEIGHTS_M["zone2"][1]


def test_task1_success_needs_both_zones_in_turn(simulation):
    sim = simulation(1)
    put(sim, "part", on_marker(sim, "marker2"))
    sim.step(30)
    assert not sim.score().success
    assert sim.score().parts["zone2_position"] == 30
    put(sim, "part", on_marker(sim, "marker1"))
    sim.step(10)
    assert not sim.score().success
    put(sim, "part", on_marker(sim, "marker2"))
    sim.step(30)
    score = sim.score()
    assert score.success
    assert score.total == 100
    # What was earned stays earned.
    put(sim, "part", [0.7, -1.0, 1.2])
    sim.step(50)
    assert sim.score().total == 100


def test_task1_late_success_earns_less(simulation):
    sim = simulation(1)
    put(sim, "part", on_marker(sim, "marker1"))
    sim.step(1600)
    put(sim, "part", on_marker(sim, "marker2"))
    sim.step(20)
    score = sim.score()
    assert score.success
    assert score.time_points == pytest.approx(20 - 2 * (score_time(sim) - 13), abs=0.5)


def score_time(sim) -> float:
    return sim.time_s


def parcel_at(sim, fixture: str, floor: float, dx: float = 0.0) -> np.ndarray:
    at = sim.position(fixture)
    return np.array([at[0] + dx, at[1], floor + t2.PARCEL_HALF_M[2]])


def test_task2_success_needs_the_scale_before_the_container(simulation):
    sim = simulation(2, "contest")
    container = t2.TABLE_TOP_M + t2.CONTAINER_FLOOR_M
    put(sim, "parcel", parcel_at(sim, "container", container))
    sim.step(30)
    assert sim.score().parts == {
        "scale_position": 0,
        "scale_upright": 0,
        "target_position": 30,
        "target_upright": 10,
    }
    assert not sim.score().success
    put(sim, "parcel", parcel_at(sim, "scale", t2.SCALE_TOP_M))
    sim.step(20)
    assert sim.score().parts["scale_upright"] == 10
    put(sim, "parcel", parcel_at(sim, "container", container))
    sim.step(30)
    assert sim.score().success
    assert sim.score().total == 100


@pytest.mark.parametrize(("off", "points"), [(0.068, 30), (0.072, 0), (-0.068, 30), (-0.072, 0)])
def test_task2_scale_tolerance(simulation, off, points):
    sim = simulation(2, "contest")
    put(sim, "parcel", parcel_at(sim, "scale", t2.SCALE_TOP_M, dx=off))
    assert sim.task.points(sim)["scale_position"] == points


@pytest.mark.parametrize(("level", "tolerance"), [("easy", 0.05), ("contest", 0.035)])
def test_task2_target_tolerance(simulation, level, tolerance):
    sim = simulation(2, level)
    for off, points in ((tolerance - 0.002, 30), (tolerance + 0.002, 0)):
        put(sim, "parcel", parcel_at(sim, "container", t2.TABLE_TOP_M, dx=off))
        assert sim.task.points(sim)["target_position"] == points


def test_task2_a_fallen_parcel_is_placed_but_not_upright(simulation):
    sim = simulation(2)
    put(sim, "parcel", sim.position("scale") + np.array([0, 0, 0.05]), tilt=np.pi / 2)
    points = sim.task.points(sim)
    assert points["scale_position"] == 30
    assert points["scale_upright"] == 0


def test_belts_carry_what_lies_on_them_at_a_tenth_of_a_metre_per_second(simulation):
    for number, body, direction in ((1, "part", [-0.1, 0, 0]), (2, "parcel", [0, 0.1, 0])):
        sim = simulation(number, "contest", seed=9)
        sim.step(50)
        start = sim.position(body)
        sim.step(100)
        assert sim.position(body) - start == pytest.approx(direction, abs=0.003)
        assert tilt_rad(sim.rotation(body)) < 0.01


def test_task2_belt_ends_at_the_tables_edge_and_the_parcel_waits_there(simulation):
    sim = simulation(2, "contest", seed=9)
    sim.step(1000)
    start = sim.position("parcel")
    sim.step(200)
    assert sim.position("parcel") == pytest.approx(start, abs=0.005)
    assert start[1] < -0.05
    assert tilt_rad(sim.rotation("parcel")) < 0.05


RANGES = {
    1: {
        "part": ((0.7, 0.9), (0.45, 0.65)),
        "marker1": ((0.36, 0.52), (-0.05, 0.08)),
        "marker2": ((0.35, 0.54), (-0.56, -0.36)),
    },
    2: {
        "parcel": ((0.35, 0.55), (-0.8, -0.3)),
        "scale": ((0.30, 0.50), (0.05, 0.25)),
        "container": ((0.3, 0.5), (0.4, 0.7)),
    },
}


@pytest.mark.parametrize("number", RANGES)
@pytest.mark.parametrize("level", ["easy", "contest"])
def test_starts_fill_the_contests_ranges_or_their_middle_third(simulation, number, level):
    starts = {body: [] for body in RANGES[number]}
    for seed in range(60):
        sim = simulation(number, level, seed)
        for body, places in starts.items():
            places.append(sim.position(body)[:2])
    for body, places in starts.items():
        for axis, (low, high) in enumerate(RANGES[number][body]):
            values = np.array(places)[:, axis]
            third = (high - low) / 3 if level == "easy" else 0.0
            assert low + third <= values.min()
            assert values.max() <= high - third
            # and they do fill it
            assert np.ptp(values) > 0.8 * (high - low - 2 * third)


def test_nothing_penetrates_anything_at_the_start(simulation):
    for number in TASKS:
        for seed in range(10):
            sim = simulation(number, "contest", seed)
            deep = [contact.dist for contact in sim.data.contact[: sim.data.ncon]]
            assert min(deep, default=0.0) > -0.002


def test_draw_stays_in_range():
    rng = np.random.default_rng(0)
    for level, low, high in ((Level.CONTEST, 0, 3), (Level.EASY, 1, 2)):
        values = [draw(rng, 0, 3, level) for _ in range(200)]
        assert low <= min(values) < low + 0.1
        assert high - 0.1 < max(values) <= high


def test_time_bonus():
    bonus = TimeBonus(full=20, until_s=13, loss_per_s=2)
    assert [bonus.at(time) for time in (0, 13, 14, 23, 60)] == [20, 20, 18, 0, 0]


@pytest.mark.parametrize(("number", "level"), [(0, "easy"), (9, "easy"), (1, "hard"), (1, "")])
def test_unknown_tasks_and_levels_are_named(number, level):
    with pytest.raises(UsageError, match="there is no"):
        make_task(number, level)


def test_instructions_and_names_are_the_stages():
    assert {number: task.name for number, task in TASKS.items() if number <= 2} == {
        1: "task1_moving_grasp",
        2: "task2_weighing",
    }
    assert all(task.instruction and task.number == number for number, task in TASKS.items())
