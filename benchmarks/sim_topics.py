"""Does the simulator keep up over ROS beside a policy? Three 640x480 jpeg cameras at 30 Hz, states at 500 Hz.

    python benchmarks/sim_topics.py [--task 1] [--seconds 10] [--json FILE] [--check]

Starts the simulator, the policy node with the tiny policy and the executor node as processes, listens, and
counts in simulated time once chunks are flowing and the first seconds are over.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec

ROBOT = "kuavo_sim"
DOMAIN = 96
PATIENCE_S = 90.0
SETTLED_S = 5.0
TASK_NAMES = {1: "task1_moving_grasp", 2: "task2_weighing", 3: "task3_placement", 4: "task4_sorting"}
CAMERA_HZ, STATE_HZ = 30.0, 500.0
# Of what was asked for; the rest is what a busy scheduler may take.
SHARE = 0.97
CLOCK = "/clock"


class Ear:
    """Counts what arrives on the simulator's topics, undecoded but for the clock."""

    def __init__(self, spec: RobotSpec) -> None:
        import rclpy
        from rclpy.qos import qos_profile_sensor_data
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CompressedImage, JointState
        from trajectory_msgs.msg import JointTrajectory

        self.counts: Counter[str] = Counter()
        self.now_s = 0.0
        rclpy.init(domain_id=DOMAIN)
        self.node = rclpy.create_node("ear")
        self.cameras = {camera.name: spec.streams[camera.stream].topic for camera in spec.cameras.values()}
        for topic in self.cameras.values():
            self._hear(CompressedImage, topic, qos_profile_sensor_data)
        self.state = next(iter({spec.streams[block.stream].topic for block in spec.state if block.joints}))
        self._hear(JointState, self.state, qos_profile_sensor_data)
        self._hear(JointTrajectory, "/policy/action_chunk", 10)
        self.node.create_subscription(Clock, CLOCK, self._tick, 10)

    def _hear(self, kind: Any, topic: str, qos: Any) -> None:
        self.node.create_subscription(kind, topic, lambda _: self.counts.update((topic,)), qos, raw=True)

    def _tick(self, message: Any) -> None:
        self.now_s = message.clock.sec + message.clock.nanosec * 1e-9

    def listen_until(self, condition: Callable[[], bool], what: str) -> None:
        import rclpy

        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {PATIENCE_S:g} s")
            rclpy.spin_once(self.node, timeout_sec=0.01)


@contextmanager
def node(module: str, log: Path, **parameters: Any) -> Iterator[subprocess.Popen[bytes]]:
    line = [sys.executable, "-m", f"kuavo_smolvla_ros.nodes.{module}", "--ros-args"]
    for name, value in parameters.items():
        line += ["-p", f"{name}:={json.dumps(value)}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(task: int, seconds: float, folder: Path) -> dict[str, float]:
    from kuavo_smolvla_ros.policy.untrained import save_untrained

    spec = load_spec(ROBOT)
    checkpoint = save_untrained(spec, folder / "policy", pose=f"task{task}_ready")
    ear = Ear(spec)
    thinking = {"checkpoint": str(checkpoint), "instruction": TASK_NAMES[task], "dry_run": False}
    with (
        node("sim_node", folder / "sim.log", robot=ROBOT, task=task, real_time_factor=1.0) as sim,
        node("executor_node", folder / "executor.log", robot=ROBOT, use_sim_time=True),
        node("policy_node", folder / "policy.log", robot=ROBOT, use_sim_time=True, **thinking) as policy,
    ):
        ear.listen_until(lambda: ear.counts["/policy/action_chunk"] > 0, "the first chunk")
        settled = ear.now_s + SETTLED_S
        ear.listen_until(lambda: ear.now_s >= settled, "the simulated clock")
        counts, clock, start, busy = (
            ear.counts.copy(),
            time.monotonic(),
            ear.now_s,
            [cpu_s(sim), cpu_s(policy)],
        )
        ear.listen_until(lambda: ear.now_s >= start + seconds, "the simulated clock")
        took, simulated = time.monotonic() - clock, ear.now_s - start
        busy = [cpu_s(sim) - busy[0], cpu_s(policy) - busy[1]]
    heard = {topic: (ear.counts[topic] - counts[topic]) / simulated for topic in ear.counts}
    return {
        "real_time_factor": simulated / took,
        **{f"{role}_hz": heard.get(topic, 0.0) for role, topic in ear.cameras.items()},
        "joint_states_hz": heard.get(ear.state, 0.0),
        "chunks_hz": heard["/policy/action_chunk"],
        "sim_cores": busy[0] / took,
        "policy_cores": busy[1] / took,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=int, choices=sorted(TASK_NAMES), default=1, help="default 1")
    parser.add_argument("--seconds", type=float, default=10.0, help="simulated, to count in (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args()
    dds.apply(loopback=True)
    os.environ["ROS_DOMAIN_ID"] = str(DOMAIN)
    os.environ["OMP_NUM_THREADS"] = "1"  # one core for the policy; the other is the robot's
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.task, args.seconds, Path(folder))
    missed = []
    for name, value in figures.items():
        wanted = {"real_time_factor": 1.0, "joint_states_hz": STATE_HZ}.get(name)
        wanted = CAMERA_HZ if "_cam_" in name else wanted
        short = wanted is not None and value < SHARE * wanted
        missed += [name] if short else []
        print(f"{name:20} {value:8.3f}" + (f"  of {wanted:g}{'  SHORT' if short else ''}" if wanted else ""))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("sim_topics: " + ("keeps up" if not missed else f"falls short of {SHARE:.0%}: {', '.join(missed)}"))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
