"""What the recorder costs and what it loses: three cameras at 30 Hz, two joint states at 500 Hz, commands.

    python benchmarks/recorder.py [--seconds 20] [--json FILE] [--check]

A process plays the robot and numbers its messages: 640x480 JPEG pictures of a textured scene, joint states of
28 joints and of two grippers, commands at 100 Hz. The recorder records them; then the numbers in the
recording are compared. In a second episode the recorder is stopped by SIGSTOP for a while; more are ended by
SIGKILL, of which the worst counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from node import Watcher, cpu_seconds, memory_mb, node, running

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.data.bags import open_bag
from kuavo_smolvla_ros.robot.spec import load_spec

ROBOT = "kuavo_sim"
STATE_HZ = 500
COMMAND_HZ = 100
CAMERA_HZ = 30
HELD_UP_S = 1.5
KILLED_AFTER_S = (2.0, 2.13, 2.26, 2.39)  # against the rhythm of writing
NS_PER_S = 1_000_000_000


class Target(NamedTuple):
    figure: str
    limit: float
    reason: str


TARGETS = (
    Target("lost_messages", 0, "what a recording lacks no conversion brings back"),
    Target("core_percent", 30.0, "the robot's computer has other things to do"),
    Target("killed_lost_s", 1.0, "promise: a recorder that is killed loses at most a second"),
    Target("held_up_lost", 0, "a busy machine puts a process aside; what waits must be kept for it"),
    Target("write_amplification", 1.1, "nothing is written twice; indices and headers are small"),
)


def play_robot() -> None:
    """The robot's side, in a process of its own (started by this program with --play-robot)."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CompressedImage, JointState

    from kuavo_smolvla_ros.data.synthetic import TexturedFrames
    from kuavo_smolvla_ros.robot.images import encode_jpeg
    from kuavo_smolvla_ros.robot.messages import build

    spec = load_spec(ROBOT)
    rclpy.init()
    robot = rclpy.create_node("robot")
    pictures = [
        build(CompressedImage, {"format": "jpeg", "data": encode_jpeg(frame, 90)})
        for frame in TexturedFrames(8, 480, 640, seed=0)
    ]
    names = [f"joint_{i}" for i in range(28)]
    state = build(JointState, {"name": names, "position": [0.1] * 28, "velocity": [0.0] * 28})
    kinds = {s.name: CompressedImage if "Image" in s.type else JointState for s in spec.streams.values()}
    outs = {
        s.name: robot.create_publisher(
            kinds[s.name], s.topic, qos_profile_sensor_data if s.direction == "in" else 10
        )
        for s in spec.streams.values()
    }
    states = [s.name for s in spec.inputs.values() if kinds[s.name] is JointState]
    cameras = [camera.stream for camera in spec.cameras.values()]
    sent: dict[str, int] = defaultdict(int)

    def send(stream: str, message: Any) -> None:
        message.header.stamp = robot.get_clock().now().to_msg()
        message.header.frame_id = str(sent[stream])
        sent[stream] += 1
        outs[stream].publish(message)

    begun, tick = time.monotonic(), 0
    print("up", flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            tick += 1
            time.sleep(max(0.0, begun + tick / STATE_HZ - time.monotonic()))
            for stream in states:
                send(stream, state)
            if tick % (STATE_HZ // COMMAND_HZ) == 0:
                for stream in spec.outputs:
                    send(stream, state)
            for place, stream in enumerate(cameras):  # in turns, and each as often as a camera
                due = int((tick + place * 5) * CAMERA_HZ / STATE_HZ)
                if due > int((tick - 1 + place * 5) * CAMERA_HZ / STATE_HZ):
                    send(stream, pictures[due % len(pictures)])


def call(watch: Watcher, service: str) -> str:
    from std_srvs.srv import Trigger

    client = watch.node.create_client(Trigger, service)
    watch.wait(client.service_is_ready, service)
    future = client.call_async(Trigger.Request())
    watch.wait(future.done, f"the answer of {service}")
    answer = future.result()
    if not answer.success:
        raise SystemExit(f"recorder.py: {service}: {answer.message}")
    return str(answer.message)


def measure(watch: Watcher, folder: Path, seconds: float) -> dict[str, float]:
    recording = {"robot": ROBOT, "folder": str(folder), "task": "task2_weighing", "min_free_gb": 0.0}
    figures: dict[str, float] = {}
    with running(__file__, "--play-robot"):
        with running(*node("recorder_node", **recording)) as recorder:
            begin(watch)
            load, cpu, begun = os.getloadavg()[0], cpu_seconds(recorder.pid), time.monotonic()
            time.sleep(seconds)
            figures["core_percent"] = (cpu_seconds(recorder.pid) - cpu) / (time.monotonic() - begun) * 100
            figures["memory_mb"] = memory_mb(recorder.pid)
            figures["load"] = (load + os.getloadavg()[0]) / 2
            print(call(watch, "/recorder/stop"))
        with running(*node("recorder_node", **recording)) as recorder:
            begin(watch)
            recorder.send_signal(signal.SIGSTOP)
            time.sleep(HELD_UP_S)
            recorder.send_signal(signal.SIGCONT)
            call(watch, "/recorder/stop")
        killed_ns = []
        for after_s in KILLED_AFTER_S:
            with running(*node("recorder_node", **recording)) as recorder:
                begin(watch)
                time.sleep(after_s)
                recorder.send_signal(signal.SIGKILL)
                killed_ns.append(time.time_ns())
                recorder.wait()
    whole, held_up, *cut = sorted(folder.iterdir())
    figures |= look_at(whole)
    figures["held_up_lost"] = look_at(held_up)["lost_messages"]
    lost_s = []
    for path, when_ns in zip(cut, killed_ns, strict=True):
        with open_bag(path) as bag:
            lost_s.append((when_ns - max(message.receive_ns for message in bag.messages())) / NS_PER_S)
    return figures | {"killed_lost_s": max(lost_s)}


def begin(watch: Watcher) -> None:
    """Start an episode once all streams have been heard for a while."""
    from std_srvs.srv import Trigger

    client = watch.node.create_client(Trigger, "/recorder/start")
    watch.wait(client.service_is_ready, "the recorder")
    deadline, told = time.monotonic() + 60, "no answer"
    while time.monotonic() < deadline:
        # A recorder that was killed still counts as there for a while, and answers nothing.
        future = client.call_async(Trigger.Request())
        until = time.monotonic() + 1.0
        while not future.done() and time.monotonic() < until:
            time.sleep(0.01)
        if future.done():
            told = future.result().message
            # An answer that came too late had begun the episode all the same.
            if future.result().success or "is being recorded" in told:
                return
        time.sleep(0.1)
    raise SystemExit(f"recorder.py: no episode begins: {told}")


def look_at(path: Path) -> dict[str, float]:
    """Numbers that are missing, by what the messages themselves say."""
    numbers: dict[str, list[int]] = defaultdict(list)
    stamps: dict[str, list[int]] = defaultdict(list)
    size = 0
    with open_bag(path) as bag:
        for message in bag.messages():
            size += len(message.data)
            numbers[message.topic].append(int(message.decode().header.frame_id))
            stamps[message.topic].append(message.receive_ns)
        if bag.damages:
            raise SystemExit(f"recorder.py: {path}: {bag.damages}")
    lost = sum(max(seen) - min(seen) + 1 - len(set(seen)) for seen in numbers.values())
    on_disk = sum(file.stat().st_size for file in path.iterdir())
    gaps = [float(np.diff(np.array(times)).max()) / 1e6 for times in stamps.values()]
    seconds = max((max(times) - min(times)) / NS_PER_S for times in stamps.values())
    return {
        "lost_messages": float(lost),
        "messages": float(sum(map(len, numbers.values()))),
        "messages_per_s": sum(map(len, numbers.values())) / seconds,
        "topics": float(len(numbers)),
        "mb_per_s": size / 1e6 / seconds,
        "longest_gap_ms": max(gaps),
        "write_amplification": on_disk / size,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="length of the episode (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    parser.add_argument("--play-robot", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play_robot:
        play_robot()
        return 0
    dds.apply(loopback=True)
    os.environ.setdefault("ROS_DOMAIN_ID", "94")
    watch = Watcher()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(watch, Path(folder), args.seconds)
    finally:
        watch.close()
    limits = {t.figure: t for t in TARGETS}
    missed = [t.figure for t in TARGETS if figures[t.figure] > t.limit]
    for name, value in figures.items():
        target = limits.get(name)
        print(f"{name:22}{value:12.3f}  {f'<= {target.limit:g}: {target.reason}' if target else ''}".rstrip())
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(
        f"{len(TARGETS) - len(missed)} of {len(TARGETS)} targets met"
        + (f", missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
