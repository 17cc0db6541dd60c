"""Inverse kinematics: what can be reached is reached, and what cannot is said to be missed."""

from __future__ import annotations

import mink
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.expert import along_hand, hand_yaw, raised
from kuavo_smolvla_ros.sim.experts.reach import SHOULDER, bearing, distance, options, reachable_x
from kuavo_smolvla_ros.sim.ik import COMFORT_DEG, LIMIT_MARGIN_RAD, ArmIK, approach, hand_pose

ARMS = {side: ArmIK(side) for side in kuavo.SIDES}


def angle_between(one: mink.SE3, other: mink.SE3) -> float:
    return float(np.linalg.norm((one.rotation().inverse() @ other.rotation()).log()))


@given(st.sampled_from(kuavo.SIDES), st.lists(st.floats(-0.25, 0.25), min_size=7, max_size=7))
@settings(max_examples=40, deadline=None)
def test_a_pose_the_arm_can_take_is_found_again(side, offsets):
    arm = ARMS[side]
    comfort = np.deg2rad(COMFORT_DEG[side])
    arm.set_joints(comfort + offsets)
    goal = arm.pose()
    arm.set_joints(comfort)
    distance_m, turn = arm.solve(goal, iterations=40)
    assert distance_m < 0.002
    assert turn < 0.02


@given(
    st.sampled_from(kuavo.SIDES),
    st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3),
    st.floats(-3, 3),
    st.floats(-1, 1),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_asked_the_joints_stay_inside_their_limits(side, place, yaw, pitch):
    arm = ARMS[side]
    arm.set_joints(np.deg2rad(COMFORT_DEG[side]))
    arm.solve(hand_pose(side, place, yaw, pitch), iterations=10)
    lower = np.array([joint.lower for joint in kuavo.ARMS[side]])
    upper = np.array([joint.upper for joint in kuavo.ARMS[side]])
    assert np.all(arm.joints >= lower + LIMIT_MARGIN_RAD - 1e-6)
    assert np.all(arm.joints <= upper - LIMIT_MARGIN_RAD + 1e-6)


@pytest.mark.parametrize("side", kuavo.SIDES)
def test_a_place_beyond_the_arm_is_a_miss_and_nothing_moves(side):
    arm = ARMS[side]
    arm.set_joints(np.deg2rad(COMFORT_DEG[side]))
    before = arm.joints
    away = SHOULDER[side] + [1.0, 0.0, 0.0]
    assert arm.probe(hand_pose(side, away, 0.0, 0.0))[1] > 0.25
    assert arm.joints == pytest.approx(before)


@pytest.mark.parametrize("side", kuavo.SIDES)
def test_hand_pose_points_where_it_says_and_opens_sideways(side):
    rotation = hand_pose(side, [0.4, 0, 1], yaw_rad=0.3, pitch_rad=0.2).rotation().as_matrix()
    ahead = -rotation[:, 2]
    assert np.arctan2(ahead[1], ahead[0]) == pytest.approx(0.3)
    assert ahead[2] == pytest.approx(-np.sin(0.2))
    assert rotation[2, 0] == pytest.approx(0.0, abs=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)


def test_hand_helpers():
    pose = hand_pose("left", [0.4, 0.1, 1.0], yaw_rad=0.5, pitch_rad=0.0)
    assert hand_yaw(pose) == pytest.approx(0.5)
    ahead = along_hand(pose, 0.1).translation() - pose.translation()
    assert ahead == pytest.approx([0.1 * np.cos(0.5), 0.1 * np.sin(0.5), 0], abs=1e-12)
    assert raised(pose, 0.2, [0.1, -0.1]).translation() == pytest.approx([0.5, 0.0, 1.2])


def test_an_approach_starts_at_the_start_and_ends_on_the_goal_wherever_that_has_gone():
    start = hand_pose("left", [0.3, 0.0, 1.0], 0.0, 0.1)
    first = hand_pose("left", [0.5, 0.2, 1.0], 0.4, 0.2)
    now = hand_pose("left", [0.4, 0.3, 1.1], 0.1, 0.2)
    begun, ended = approach(start, first, first, 0.0), approach(start, first, now, 1.0)
    assert begun.translation() == pytest.approx(start.translation())
    assert angle_between(begun, start) == pytest.approx(0, abs=1e-6)
    assert ended.translation() == pytest.approx(now.translation())
    assert angle_between(ended, now) == pytest.approx(0, abs=1e-6)


def test_a_hand_beside_a_moving_goal_moves_with_it():
    start = hand_pose("left", [0.3, 0.0, 1.0], 0.0, 0.1)
    first = hand_pose("left", [0.5, 0.0, 1.0], 0.0, 0.1)
    moved = raised(first, 0.0, [0.0, 0.07])
    assert approach(start, first, moved, 0.0).translation() == pytest.approx([0.3, 0.07, 1.0])


def test_options_begin_with_the_centre_and_come_nearer():
    wanted = options("right", [0.5, 0.2, 1.0], slack_m=0.06)
    place, yaw = wanted[0]
    assert place == pytest.approx([0.5, 0.2, 1.0])
    assert yaw == pytest.approx(bearing("right", place))
    distances = [distance("right", place) for place, _ in wanted]
    assert distances == sorted(distances, reverse=True)
    assert all(np.abs(place[:2] - [0.5, 0.2]).max() <= 0.06 + 1e-12 for place, _ in wanted)


def test_reachable_x_is_at_the_reach():
    x = reachable_x("left", 0.5, 1.0, 0.64)
    assert distance("left", [x, 0.5, 1.0]) == pytest.approx(0.64)
