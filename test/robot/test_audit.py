"""The check's verdicts: a healthy stream passes, and each way of being unhealthy is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sensor_msgs.msg import CompressedImage, JointState

from kuavo_smolvla_ros.robot.audit import StreamAudit, StreamReport, reports
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, stamp_fields
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.vectors import encode_action, encode_state

SPEC = load_spec("kuavo_sim")
START_NS = 1_700_000_000 * NS_PER_S
MS = 1_000_000
PICTURE = encode_jpeg(np.zeros((480, 640, 3), np.uint8), 90)
REST = np.array([SPEC.poses["task1_ready"].get(n, 0.5) for n in SPEC.state_names])


def message(stream: str, stamp: int) -> Any:
    if SPEC.streams[stream].type.endswith("CompressedImage"):
        return build(CompressedImage, {"format": "jpeg", "data": PICTURE, **stamp_fields(stamp)})
    fields = encode_state(SPEC, REST) | encode_action(SPEC, REST)
    return build(JointState, {**fields[stream], **stamp_fields(stamp)})


def unchanged(i: int, m: Any) -> Any:
    return m


def audit(
    stream: str,
    *,
    seconds: float = 1.0,
    rate_hz: float | None = None,
    age_ms: float = 5.0,
    change: Callable[[int, Any], Any] = unchanged,
) -> StreamAudit:
    """A stream as it would be heard, with one thing changed."""
    result = StreamAudit(SPEC, SPEC.streams[stream], found_type=SPEC.streams[stream].type)
    step = int(NS_PER_S / (rate_hz or SPEC.streams[stream].rate_hz))
    for i, stamp in enumerate(range(START_NS, START_NS + int(seconds * NS_PER_S), step)):
        result.add(stamp + int(age_ms * MS), change(i, message(stream, stamp)))
    return result


def report(audit: StreamAudit) -> StreamReport:
    return audit.report()


@pytest.mark.parametrize("stream", list(SPEC.streams))
def test_healthy_stream_has_no_problem(stream: str) -> None:
    row = report(audit(stream))
    assert row.problems == ()
    assert row.rate_hz == pytest.approx(SPEC.streams[stream].rate_hz, rel=0.01)
    assert row.age_p50_ms == pytest.approx(5.0)
    assert row.shape == {"head_image": "640x480"}.get(stream, row.shape)


def test_all_streams_together_fit() -> None:
    rows = reports(SPEC, {name: audit(name) for name in SPEC.streams})
    assert [row.problems for row in rows] == [()] * len(SPEC.streams)
    assert all(row.skew_p99_ms is not None and row.skew_p99_ms < 40 for row in rows if row.direction == "in")


def test_slow_camera_is_skewed_against_the_others() -> None:
    audits = {name: audit(name) for name in SPEC.streams} | {"head_image": audit("head_image", rate_hz=9)}
    problems = {row.stream: row.problems for row in reports(SPEC, audits)}
    assert any("behind the newest stream (p99), allowed is 50 ms" in p for p in problems["head_image"])
    assert not any(problems[name] for name in problems if name != "head_image")


def nan_in_joint(i: int, m: Any) -> Any:
    m.position[3] = float("nan")
    return m


def degrees_instead_of_radians(i: int, m: Any) -> Any:
    m.position = [float(np.degrees(v)) for v in m.position]
    return m


def zero_stamp(i: int, m: Any) -> Any:
    m.header.stamp.sec = m.header.stamp.nanosec = 0
    return m


def backwards(i: int, m: Any) -> Any:
    if i == 7:
        m.header.stamp.sec -= 5
    return m


def small_picture(i: int, m: Any) -> Any:
    m.data = encode_jpeg(np.zeros((240, 320, 3), np.uint8), 90)
    return m


def truncated_picture(i: int, m: Any) -> Any:
    m.data = bytes(m.data)[: len(m.data) // 2]
    return m


def one_joint_less(i: int, m: Any) -> Any:
    m.name, m.position = m.name[:-1], m.position[:-1]
    return m


@pytest.mark.parametrize(
    ("stream", "change", "says"),
    [
        ("arm_state", nan_in_joint, "zarm_l4_joint is nan"),
        ("arm_state", degrees_instead_of_radians, r"zarm_l4_joint outside -2.618..0 rad (unit? order?)"),
        ("arm_state", zero_stamp, "the stamp is zero"),
        ("arm_state", backwards, "stamps run backwards (1x)"),
        ("arm_state", one_joint_less, "'zarm_r7_joint' is missing"),
        ("head_image", small_picture, "head_cam_h is 320x240, declared is 640x480"),
        ("head_image", truncated_picture, "truncated"),
        ("head_image", zero_stamp, "the stamp is zero"),
    ],
)
def test_fault_in_messages_is_named(stream: str, change: Callable[[int, Any], Any], says: str) -> None:
    problems = report(audit(stream, change=change)).problems
    assert any(says in p for p in problems), problems


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rate_hz": 20}, "rate is 20.0 Hz, declared is 30 Hz"),
        ({"age_ms": 400.0}, "1 % of the messages are older than 250 ms on arrival"),
        ({"age_ms": -200.0}, "stamps up to 200 ms in the future"),
        ({"rate_hz": 3}, "a gap of 333 ms, allowed is 250 ms"),
    ],
)
def test_fault_in_times_is_named(arguments: dict[str, Any], says: str) -> None:
    problems = report(audit("head_image", **arguments)).problems
    assert any(says in p for p in problems), problems


def test_silent_stream_and_wrong_type_are_named() -> None:
    silent = StreamAudit(SPEC, SPEC.streams["arm_state"])
    assert report(silent).problems == ("nothing on /kuavo/arm_state",)
    silent.found_type = "std_msgs/msg/String"
    assert "type is std_msgs/msg/String, declared is sensor_msgs/msg/JointState" in report(silent).problems


def test_command_topic_of_a_live_robot_needs_a_listener_not_messages() -> None:
    command = StreamAudit(SPEC, SPEC.streams["arm_command"], expects_messages=False)
    assert report(command).problems == ("nobody listens on /kuavo_arm_traj",)
    command.found_type = SPEC.streams["arm_command"].type
    assert report(command).problems == ()
