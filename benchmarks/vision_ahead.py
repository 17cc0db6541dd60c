"""From the newest picture to the chunk, with and without pictures encoded as they come in: real processes.

    python benchmarks/vision_ahead.py [--seconds 6] [--rounds 3] [--json FILE] [--check]     four minutes

A process plays the robot (`node.py --play-robot`): three 640x480 jpeg cameras at 30 Hz, together or a third
of a period apart, joint states at 500 Hz. A policy node thinks in realtime mode, on one thread; its parameter
`vision_ahead` is switched by turns, so that what disturbs the machine disturbs both. The policy is the tiny
one, once as it is and once with larger pictures, whose encoder then weighs more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from node import ROBOT, Target, Watcher, cpu_seconds, node, running

from kuavo_smolvla_ros import dds
from kuavo_smolvla_ros.robot.spec import load_spec

SIDES = (64, 128)
CAMERAS = {"apart": ["--staggered"], "together": []}
SETTLE_S = 1.0


TARGETS = (
    Target(
        "apart_{side}_above_rest",
        1.0,
        "cameras encodings by which vision delays the chunk: all but the last can be done while waiting",
    ),
    Target(
        "apart_{side}_wasted", 0.34, "pictures encoded for nothing, of all that were: one thought in three"
    ),
    Target(
        "apart_{side}_cpu_ratio", 1.15, "processor time against encoding later: the same work, only earlier"
    ),
    Target("together_{side}_ratio", 1.1, "cameras that leave nothing to do ahead must not lose by it"),
)


class Switch:
    """Turns a policy node off and on again with another setting."""

    def __init__(self, watch: Watcher) -> None:
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import SetParameters

        self._watch = watch
        self._change = watch.node.create_client(ChangeState, "/policy/change_state")
        self._set = watch.node.create_client(SetParameters, "/policy/set_parameters")

    def _ask(self, client: Any, request: Any) -> Any:
        self._watch.wait(client.service_is_ready, client.srv_name)
        future = client.call_async(request)
        self._watch.wait(future.done, client.srv_name)
        return future.result()

    def turn(self, ahead: bool) -> None:
        from lifecycle_msgs.msg import Transition
        from lifecycle_msgs.srv import ChangeState
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        off, on = Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVATE
        setting = Parameter("vision_ahead", value=ahead).to_parameter_msg()
        self._ask(self._change, ChangeState.Request(transition=Transition(id=off)))
        self._ask(self._set, SetParameters.Request(parameters=[setting]))
        self._ask(self._change, ChangeState.Request(transition=Transition(id=on)))


def one_round(watch: Watcher, pid: int, seconds: float) -> dict[str, float]:
    """Medians over some seconds, by the chunks' own stamps: an observation's time is its newest picture's."""
    time.sleep(SETTLE_S)
    have, before, begun = len(watch.chunks), cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    spent = (cpu_seconds(pid) - before) / (time.monotonic() - begun)
    heard = watch.chunks[have:]
    delays = [(t - m.header.stamp.sec - m.header.stamp.nanosec / 1e9) * 1e3 for t, m in heard]
    told = watch.status["policy"]
    return {
        "picture_to_chunk_ms": float(np.median(delays)),
        "thought_ms": float(told["latency_p50_s"]) * 1e3,
        "core_percent": spent * 100,
        "encoded": float(told["encoded_ahead"]),
        "used": float(told["used_ahead"]),
        "chunks": float(len(heard)),
    }


def measure(watch: Watcher, checkpoint: Path, cameras: str, args: argparse.Namespace) -> dict[str, Any]:
    thinking = {"checkpoint": str(checkpoint), "instruction": "task1_moving_grasp", "robot": ROBOT}
    thinking |= {"n_action_steps": args.steps}
    robot = str(Path(__file__).with_name("node.py"))
    rounds: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with (
        running(robot, "--play-robot", *CAMERAS[cameras]),
        running(*node("policy_node", **thinking)) as policy,
    ):
        have = len(watch.chunks)
        watch.wait(lambda: len(watch.chunks) > have + 3, "chunks")
        switch = Switch(watch)
        for _ in range(args.rounds):
            for ahead in (False, True):
                switch.turn(ahead)
                rounds[ahead].append(one_round(watch, policy.pid, args.seconds))
                print(f"{cameras} ahead={ahead}: {rounds[ahead][-1]}", file=sys.stderr)
    return {
        "later" if not ahead else "ahead": {
            name: statistics.median(r[name] for r in found) for name in found[0]
        }
        for ahead, found in rounds.items()
    }


def figures_of(found: dict[str, Any], encode_ms: float) -> dict[str, float]:
    """`above_rest`: how many cameras' encodings vision still adds to what no vision at all would take."""
    later, ahead = found["later"], found["ahead"]
    gained = later["picture_to_chunk_ms"] - ahead["picture_to_chunk_ms"]
    return {
        "ratio": ahead["picture_to_chunk_ms"] / later["picture_to_chunk_ms"],
        "gained_ms": gained,
        "encode_ms": encode_ms,
        "above_rest": 3 - gained / encode_ms,
        "wasted": 1 - ahead["used"] / ahead["encoded"] if ahead["encoded"] else 0.0,
        "cpu_ratio": ahead["core_percent"] / later["core_percent"],
    }


def encoding_ms(checkpoint: Path) -> float:
    """One camera from message to tokens, on one thread: the best of some."""
    import cv2
    import torch

    from kuavo_smolvla_ros.policy.runtime import PolicyRunner
    from kuavo_smolvla_ros.robot.images import encode_jpeg

    torch.set_num_threads(1)
    runner = PolicyRunner.load(checkpoint)
    scene = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    data, times = np.frombuffer(encode_jpeg(scene, 85), np.uint8), []
    for number in range(30):
        started = time.perf_counter()
        runner.encode_camera("head_cam_h", cv2.imdecode(data, cv2.IMREAD_COLOR), number)
        times.append(time.perf_counter() - started)
    return statistics.median(times[5:]) * 1e3


def make_checkpoint(folder: Path, side: int) -> Path:
    """The tiny policy, its pictures this wide and high."""
    from kuavo_smolvla_ros.policy.untrained import save_untrained

    made = save_untrained(load_spec(ROBOT), folder / f"tiny{side}", pose="task1_ready")
    for name in ("config.json", "policy_preprocessor.json"):
        file = made / name
        file.write_text(json.dumps(_resized(json.loads(file.read_text()), side)))
    return made


def _resized(value: Any, side: int) -> Any:
    if not isinstance(value, dict):
        return [_resized(v, side) for v in value] if isinstance(value, list) else value
    return {
        key: [side, side] if key in ("resize_imgs_with_padding", "size") else _resized(inner, side)
        for key, inner in value.items()
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each turn (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind (default 3)")
    parser.add_argument("--steps", type=int, default=4, help="steps between two thoughts (default 4)")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of pictures (default 64 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    dds.apply(loopback=True)
    os.environ.setdefault("ROS_DOMAIN_ID", "96")
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {side: make_checkpoint(Path(folder), side) for side in args.sides}
        encode_ms = {side: encoding_ms(checkpoint) for side, checkpoint in checkpoints.items()}
        watch = Watcher()
        try:
            for side, checkpoint in checkpoints.items():
                for cameras in CAMERAS:
                    medians = measure(watch, checkpoint, cameras, args)
                    found[f"{cameras}_{side}"] = medians | figures_of(medians, encode_ms[side])
        finally:
            watch.close()
    print(f"{'cameras, picture':18}{'later ms':>10}{'ahead ms':>10}{'one takes':>11}{'above rest':>12}"
          f"{'thought ms':>16}{'core %':>12}{'wasted':>8}")  # fmt: skip
    for name, f in found.items():
        later, ahead = f["later"], f["ahead"]
        print(
            f"{name:18}{later['picture_to_chunk_ms']:>10.1f}{ahead['picture_to_chunk_ms']:>10.1f}"
            f"{f['encode_ms']:>8.1f} ms{f['above_rest']:>8.2f} cam"
            f"{later['thought_ms']:>8.1f}{ahead['thought_ms']:>8.1f}"
            f"{later['core_percent']:>6.0f}{ahead['core_percent']:>6.0f}{f['wasted']:>8.0%}"
        )
    missed = []
    for target in TARGETS:
        for side in args.sides:
            run, figure = target.figure.format(side=side).split(f"{side}_")
            value = found[f"{run}{side}"][figure]
            if value > target.limit:
                missed.append(f"{run}{side} {figure} {value:.2f} > {target.limit:g} ({target.reason})")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    gains = ", ".join(f"{name} {f['ratio']:.2f}" for name, f in found.items())
    print(f"picture to chunk, ahead against later: {gains}; missed: {'; '.join(missed) or 'nothing'}")
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
