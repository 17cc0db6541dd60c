"""The clock, the servos, the base: what every task stands on."""

from __future__ import annotations

import hashlib

import mujoco
import numpy as np
import pytest

from kuavo_smolvla_ros.sim import kuavo, scene
from kuavo_smolvla_ros.sim.command import action_limits, velocity_limits
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Task, TimeBonus
from kuavo_smolvla_ros.sim.tasks import make_task


class Empty(Task):
    """Nothing but the robot and a loose cube on the floor."""

    number = 4
    name = "empty"
    instruction = "Stand"
    time_limit_s = 5.0
    time_bonus = TimeBonus(0, 0, 0)
    mobile = True

    def build(self, spec: mujoco.MjSpec) -> None:
        cube = scene.add_loose(spec, "cube")
        cube.add_geom(type=scene.BOX, size=[0.05, 0.05, 0.05], mass=0.1, **scene.SOLID)

    def place(self, sim, rng) -> None:
        sim.put_loose("cube", [1.0, 0.0, 0.05])

    def points(self, sim) -> dict[str, float]:
        return {"far": float(sim.base_pose()[0] > 0.1)}

    def succeeded(self, sim, best) -> bool:
        return False


@pytest.fixture(scope="module")
def walker() -> Simulation:
    return Simulation(Empty())


def wave(sim: Simulation, actions: int) -> str:
    """Commands that use every joint; the trajectory as a hash of every position on the way."""
    digest = hashlib.sha256()
    start = sim.state()
    for step in range(actions):
        goal = start + 0.2 * np.sin(0.3 * step + np.arange(16))
        goal[[7, 15]] = 0.5 + 0.5 * np.sin(0.5 * step)
        sim.act(np.clip(goal, *action_limits(mobile=False)))
        digest.update(sim.data.qpos.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("number", [1, 2])
def test_same_seed_and_commands_same_trajectory_bit_for_bit(simulation, number):
    first = wave(simulation(number, "contest", seed=5), 20)
    again = wave(simulation(number, "contest", seed=5), 20)
    elsewhere = Simulation(make_task(number, "contest"))
    elsewhere.reset(5)
    assert first == again == wave(elsewhere, 20)
    assert first != wave(simulation(number, "contest", seed=6), 20)


def test_five_small_physics_steps_are_one_control_period(simulation):
    whole = simulation(1, seed=1)
    whole.step(30)
    at_once = whole.data.qpos.copy()
    split = simulation(1, seed=1)
    for _ in range(30):
        split.begin_period()
        for _ in range(5):
            split.step_physics()
        split.end_period()
    assert np.array_equal(split.data.qpos, at_once)


def test_reset_forgets_everything(simulation):
    sim = simulation(1, seed=2)
    fresh = sim.data.qpos.copy()
    sim.set_latency(0.05)
    wave(sim, 10)
    sim.set_latency(0.0)
    sim.reset(2)
    assert np.array_equal(sim.data.qpos, fresh)
    assert sim.time_s == 0
    assert sim.score().total == 0
    assert sim.target == pytest.approx(sim.task.ready_state())


def test_an_episode_starts_in_the_ready_pose_with_open_grippers(simulation):
    sim = simulation(1)
    ready = sim.task.ready_state()
    assert sim.state() == pytest.approx(ready)
    sim.step(100)
    assert sim.state() == pytest.approx(ready, abs=0.003)
    assert ready[[7, 15]] == pytest.approx([0, 0])


def test_an_arm_follows_a_slow_target_a_tenth_of_a_second_behind(simulation):
    sim = simulation(1)
    goal = sim.state()
    speed = 0.5
    for _ in range(100):
        goal[8] -= speed * kuavo.CONTROL_PERIOD_S
        sim.command(goal)
        sim.step()
    behind_s = (sim.state()[8] - goal[8]) / speed
    assert 0.05 < behind_s < 0.2


def test_a_jump_of_the_target_is_followed_no_faster_than_the_motors_turn(simulation):
    sim = simulation(2)
    goal = sim.state()
    goal[11] = -0.2
    sim.command(goal)
    fastest, before = 0.0, sim.state()[11]
    for _ in range(100):
        sim.step()
        fastest = max(fastest, abs(sim.state()[11] - before) / kuavo.CONTROL_PERIOD_S)
        before = sim.state()[11]
    assert fastest < 1.05 * velocity_limits()[11]
    sim.step(100)
    assert sim.state()[11] == pytest.approx(-0.2, abs=0.01)


def test_the_gripper_closes_in_about_half_a_second_and_opens_again(simulation):
    sim = simulation(1)
    goal = sim.state()
    goal[7] = 1.0
    sim.command(goal)
    sim.step(30)
    assert 0.3 < sim.state()[7] < 0.8
    sim.step(50)
    assert sim.state()[7] > 0.97
    goal[7] = 0.0
    sim.command(goal)
    sim.step(80)
    assert sim.state()[7] < 0.03


def test_a_gripper_can_be_told_to_stay_half_open(simulation):
    sim = simulation(1)
    goal = sim.state()
    goal[15] = 0.5
    sim.command(goal)
    sim.step(100)
    assert sim.state()[15] == pytest.approx(0.5, abs=0.02)


def test_an_action_is_a_straight_line_of_hundred_hertz_commands(simulation):
    sim = simulation(1)
    seen = []
    start = sim.target
    goal = start.copy()
    goal[0] += 0.1
    goal[7] = 1.0
    sim.act(goal, watch=lambda: seen.append(sim.target))
    assert len(seen) == 10
    assert [target[0] for target in seen] == pytest.approx(start[0] + 0.01 * np.arange(1, 11))
    # The gripper's command is not drawn out.
    assert {target[7] for target in seen} == {1.0}
    assert sim.time_s == pytest.approx(0.1)


def test_latency_delays_commands_by_whole_periods(simulation):
    prompt, late = simulation(1, seed=4), Simulation(make_task(1))
    late.reset(4)
    late.set_latency(0.05)
    goal = prompt.state()
    goal[0] -= 0.3
    for sim in (prompt, late):
        sim.command(goal)
        sim.step(30)
    late.step(5)
    assert late.state()[0] == pytest.approx(prompt.state()[0], abs=1e-9)


@pytest.mark.parametrize("wrong", [-0.1, np.nan, np.inf])
def test_latency_must_be_a_time(simulation, wrong):
    with pytest.raises(ValueError, match="latency_s"):
        simulation(1).set_latency(wrong)


def walk_to(x: float, y: float, yaw: float, moving: float, sim: Simulation) -> np.ndarray:
    return np.concatenate([sim.target, [x, y, yaw, moving]])


def test_the_base_walks_no_faster_than_it_may_and_arrives(walker):
    walker.reset(0)
    goal = walk_to(0.4, 0.2, 0.5, 1.0, walker)
    path = [walker.base_pose()]
    for _ in range(50):
        walker.act(goal)
        path.append(walker.base_pose())
    steps = np.abs(np.diff(path, axis=0)) / kuavo.POLICY_PERIOD_S
    assert np.all(steps[:, 2] < 0.45)
    assert np.all(np.hypot(steps[:, 0], steps[:, 1]) < 0.5)
    assert walker.base_pose() == pytest.approx([0.4, 0.2, 0.5], abs=0.01)


def test_while_walking_the_arms_keep_their_last_target(walker):
    walker.reset(0)
    held = walker.target
    action = walk_to(0.5, 0.0, 0.0, 1.0, walker)
    action[[0, 8]] += 0.3
    for _ in range(5):
        walker.act(action)
    assert walker.target == pytest.approx(held)
    assert walker.base_pose()[0] > 0.1


def test_standing_ends_a_walk_where_it_is(walker):
    walker.reset(0)
    for _ in range(10):
        walker.act(walk_to(1.0, 0.0, 0.0, 1.0, walker))
    stopped = walker.base_pose()[0]
    assert 0.2 < stopped < 0.6
    for _ in range(10):
        walker.act(walk_to(1.0, 0.0, 0.0, 0.0, walker))
    assert walker.base_pose()[0] == pytest.approx(stopped, abs=0.06)


def test_a_turn_goes_the_short_way_round(walker):
    walker.reset(0)
    for target in (3.0, -3.0):
        for _ in range(90):
            walker.act(walk_to(0.0, 0.0, target, 1.0, walker))
    turned = walker.base_pose()[2]
    assert turned == pytest.approx(2 * np.pi - 3.0, abs=0.02)


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_a_base_that_has_turned_twice_can_be_told_to_stay(walker, way):
    walker.reset(0)
    assert walker.base_target == pytest.approx([0, 0, 0])
    for target in (1.5, 3.0, -1.8):  # always the same way round
        for _ in range(45):
            walker.act(walk_to(0.0, 0.0, way * target, 1.0, walker))
    before = walker.base_pose()
    assert abs(before[2]) > 3.2
    walker.act(walk_to(*walker.base_target, 0.0, walker))  # standing, as it was told
    for _ in range(3):
        stay = walk_to(*walker.base_target, 1.0, walker)
        assert abs(stay[-2]) <= kuavo.BASE_RANGE[2]
        walker.act(stay)
    assert walker.base_pose() == pytest.approx(before, abs=0.02)


def test_arms_that_swing_do_not_push_the_base(walker):
    walker.reset(0)
    for step in range(20):
        action = walk_to(0, 0, 0, 0, walker)
        action[[0, 8]] = -0.8 if step % 10 < 5 else 0.2
        walker.act(action)
        assert np.abs(walker.base_pose()).max() < 0.01


def test_a_robot_that_stands_has_no_base_pose(simulation):
    assert simulation(1).base_pose() == pytest.approx([0, 0, 0])


def hang_in_left_jaw(sim: Simulation) -> float:
    """Keep the part between the pads until they have closed on it; its height then."""
    position, _ = sim.pinch("left")
    goal = sim.state()
    goal[7] = 1.0
    sim.command(goal)
    for _ in range(60):
        sim.put_loose("part", position)
        sim.step()
    return float(position[2])


def test_a_closed_jaw_holds_by_friction_and_touch_is_seen(simulation):
    sim = simulation(1)
    assert not sim.held("part")
    height = hang_in_left_jaw(sim)
    assert sim.held("part")
    sim.step(200)
    assert sim.position("part")[2] == pytest.approx(height, abs=0.01)
    goal = sim.target
    goal[7] = 0.0
    sim.command(goal)
    sim.step(60)
    assert sim.position("part")[2] < height - 0.1
    assert not sim.held("part")


def test_a_slippery_jaw_holds_nothing():
    sim = Simulation(make_task(1))
    for name in (f"left_finger_{letter}_{part}_pad" for letter in "ab" for part in ("upper", "lower")):
        sim.model.geom(name).friction[:] = 1e-4
    height = hang_in_left_jaw(sim)
    sim.step(100)
    assert sim.position("part")[2] < height - 0.1
