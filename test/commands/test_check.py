"""`kuavo-smolvla check` on a recording made with rosbags, and on a live publisher."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from rclpy.serialization import serialize_message
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, JointState

from kuavo_smolvla_ros.cli import main
from kuavo_smolvla_ros.robot.images import encode_jpeg
from kuavo_smolvla_ros.robot.messages import NS_PER_S, build, stamp_fields
from kuavo_smolvla_ros.robot.spec import load_spec
from kuavo_smolvla_ros.robot.vectors import encode_action, encode_state

SPEC = load_spec("kuavo_sim")
# Beside another program a real process may not get its turn for a second or two.
starved = pytest.mark.flaky(reruns=2)
START_NS = 1_700_000_000 * NS_PER_S


def write_bag(path: Path, plugin: StoragePlugin, *, leave_out: str = "", seconds: float = 1.0) -> Path:
    """A short recording of every stream, as the recorder would see it."""
    store = get_typestore(Stores.ROS2_JAZZY)
    picture = encode_jpeg(np.full((480, 640, 3), 90, np.uint8), 80)
    pose = np.array([SPEC.poses["task1_ready"].get(n, 0.5) for n in SPEC.state_names])
    fields = encode_state(SPEC, pose) | encode_action(SPEC, pose)
    events = []
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        for name, stream in SPEC.streams.items():
            if name == leave_out:
                continue
            connection = writer.add_connection(stream.topic, stream.type, typestore=store)
            for stamp in range(START_NS, START_NS + int(seconds * NS_PER_S), int(NS_PER_S / stream.rate_hz)):
                if name in fields:
                    message = build(JointState, {**fields[name], **stamp_fields(stamp)})
                else:
                    message = build(
                        CompressedImage, {"format": "jpeg", "data": picture, **stamp_fields(stamp)}
                    )
                events.append((stamp + 2_000_000, connection, serialize_message(message)))
        for receive_ns, connection, raw in sorted(events, key=lambda e: e[0]):
            writer.write(connection, receive_ns, raw)
    return path


@pytest.mark.parametrize("plugin", [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_good_recording_fits(
    tmp_path: Path, plugin: StoragePlugin, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", plugin)
    rows_file = tmp_path / "rows.json"
    assert main(["check", "kuavo_sim", "--bag", str(bag), "--json", str(rows_file)]) == 0
    assert "7 streams, all fit" in capsys.readouterr().out
    document = json.loads(rows_file.read_text())
    rows = {row["stream"]: row for row in document["streams"]}
    assert document["fingerprint"] == SPEC.fingerprint
    assert rows["arm_state"]["count"] == 500
    assert rows["head_image"]["shape"] == "640x480"
    assert rows["head_image"]["age_p50_ms"] == pytest.approx(2.0)


def test_missing_topic_makes_the_check_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_bag(tmp_path / "bag", StoragePlugin.MCAP, leave_out="left_image")
    assert main(["check", "kuavo_sim", "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    assert "! nothing on /cam_l/color/image_raw/compressed" in out
    assert "7 streams, 1 that do not fit" in out


def test_what_cannot_be_read_of_a_recording_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(tmp_path / "bag", StoragePlugin.MCAP)
    file = bag / "bag.mcap"
    file.write_bytes(file.read_bytes()[: int(0.98 * file.stat().st_size)])
    rows_file = tmp_path / "rows.json"
    assert main(["check", "kuavo_sim", "--bag", str(bag), "--json", str(rows_file)]) == 1
    out = capsys.readouterr().out
    assert "! bag.mcap: cut off: " in out
    assert "7 streams, all fit; the recording is damaged in 1 places" in out
    (damage,) = json.loads(rows_file.read_text())["damages"]
    assert damage.startswith("bag.mcap: cut off: ")


def test_other_robots_description_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bag = write_bag(tmp_path / "bag", StoragePlugin.MCAP)
    assert main(["check", "kuavo", "--bag", str(bag)]) == 1
    out = capsys.readouterr().out
    assert "head_cam_h is 640x480, declared is 848x480" in out
    assert "nothing on /kuavo/claw_state" in out


def test_description_alone_prints_its_fingerprint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "kuavo_mobile"]) == 0
    assert "action 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["check", "nobody"], 1, "no robot description 'nobody'; shipped are"),
        (["check", "kuavo", "--bag", "nowhere.bag"], 1, "nowhere.bag: there is no such recording"),
        (["check", "kuavo", "--live", "--seconds", "0"], 2, "--seconds 0: must be above 0"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_file_that_is_no_recording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.mcap"
    path.write_bytes(b"not a recording at all")
    assert main(["check", "kuavo_sim", "--bag", str(path)]) == 1
    assert "bad.mcap" in capsys.readouterr().err


PUBLISHER = textwrap.dedent(
    """
    import rclpy, sys
    from sensor_msgs.msg import JointState
    from kuavo_smolvla_ros.robot.messages import build, stamp_fields
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.robot.vectors import encode_state
    import numpy as np

    spec = load_spec("kuavo_sim")
    fields = encode_state(spec, np.array([spec.poses["task1_ready"].get(n, 0.5) for n in spec.state_names]))
    rclpy.init()
    node = rclpy.create_node("half_a_robot")
    outs = {n: node.create_publisher(JointState, spec.streams[n].topic, 10) for n in fields}
    node.create_subscription(JointState, spec.streams["arm_command"].topic, lambda m: None, 10)

    def tick():
        for name, out in outs.items():
            now = stamp_fields(node.get_clock().now().nanoseconds)
            out.publish(build(JointState, {**fields[name], **now}))

    node.create_timer(0.002, tick)
    print("up", flush=True)
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        pass
    """
)


@starved
def test_live_check_sees_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    """Half a robot: joints publish, arm commands are heard; cameras and ears for the grippers are missing."""
    robot = subprocess.Popen([sys.executable, "-c", PUBLISHER], stdout=subprocess.PIPE, text=True)
    try:
        assert robot.stdout is not None
        assert robot.stdout.readline() == "up\n"
        rows_file = tmp_path / "rows.json"
        check = subprocess.run(
            [sys.executable, "-m", "kuavo_smolvla_ros.cli", "check", "kuavo_sim", "--live", "--loopback",
             "--seconds", "2", "--json", str(rows_file)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        robot.terminate()
        robot.wait(timeout=10)
    assert check.returncode == 1, check.stderr
    rows = {row["stream"]: row for row in json.loads(rows_file.read_text())["streams"]}
    assert rows["arm_state"]["count"] > 100
    assert rows["arm_state"]["shape"] == "14 joints"
    assert rows["arm_command"]["problems"] == []
    assert rows["gripper_command"]["problems"] == ["nobody listens on /gripper/command"]
    assert rows["head_image"]["problems"] == ["nothing on /cam_h/color/image_raw/compressed"]


CONDITIONS = textwrap.dedent(
    """
    import rclpy
    from rclpy.qos import DurabilityPolicy, QoSProfile
    from std_msgs.msg import Int32, String

    rclpy.init()
    node = rclpy.create_node("relay")
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    node.create_publisher(Int32, "/kuavo/arm_mode", latched).publish(Int32(data=2))
    node.create_publisher(String, "/kuavo/gait", latched).publish(String(data="walk"))
    print("up", flush=True)
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        pass
    """
)


@starved
def test_live_check_names_the_precondition_that_does_not_hold(tmp_path: Path) -> None:
    relay = subprocess.Popen([sys.executable, "-c", CONDITIONS], stdout=subprocess.PIPE, text=True)
    try:
        assert relay.stdout is not None
        assert relay.stdout.readline() == "up\n"
        rows_file = tmp_path / "rows.json"
        check = subprocess.run(
            [sys.executable, "-m", "kuavo_smolvla_ros.cli", "check", "kuavo", "--live", "--loopback",
             "--seconds", "2", "--json", str(rows_file)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    finally:
        relay.terminate()
        relay.wait(timeout=10)
    assert check.returncode == 1, check.stderr
    (problem,) = json.loads(rows_file.read_text())["preconditions"]
    assert problem == "gait is walk, needed is stance; bring the robot to a stand before the arms may move"
