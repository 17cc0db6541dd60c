"""What recording a stop costs the control loop: command times with and without a flight being written.

    python benchmarks/flight_recorder.py [--stops 15] [--json FILE] [--check]

The executor runs at 100 Hz beside a process that plays the robot (cameras, joint states). It is stopped and
resumed again and again: after a stop its thread writes the file, then it rests. Both are measured in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from node import ROBOT, Watcher, memory_mb, node, resume, running, stamps_ms

from kuavo_smolvla_ros import dds

RECORDED_S = 30.0
REST_S = 2.0
PERIOD_MS = 10.0


class Target(NamedTuple):
    figure: str
    limit: float
    reason: str


TARGETS = (
    Target("writing_jitter_p99_ms", 2.0, "a fifth of the period, as without a recorder"),
    Target("added_p99_ms", 1.0, "whoever computes holds the interpreter: only in the pauses of the loop"),
    Target("write_s", 10.0, "an operator looks at it right after the stop"),
)


def call(watch: Watcher, service: str) -> None:
    from std_srvs.srv import Trigger

    client = watch.node.create_client(Trigger, service)
    watch.wait(client.service_is_ready, service)
    future = client.call_async(Trigger.Request())
    watch.wait(future.done, f"the answer of {service}")
    watch.node.destroy_client(client)


def measure(watch: Watcher, folder: Path, stops: int) -> dict[str, float]:
    writing: list[np.ndarray] = []
    resting: list[np.ndarray] = []
    durations: list[float] = []
    here = str(Path(__file__).with_name("node.py"))
    moving: dict[str, Any] = {"robot": ROBOT, "dry_run": False, "flight_folder": str(folder)}
    with running(here, "--play-robot"), running(*node("executor_node", **moving)) as executor:
        watch.wait(watch.executor_is(state="idle"), "the executor to see the joints")
        time.sleep(RECORDED_S + 2.0)  # a ring that is full is the largest file
        for number in range(1, stops + 1):
            begun = time.monotonic()
            call(watch, "/executor/stop")
            have = len(watch.commands)  # a request is decided in a period of its own, out of turn
            watch.wait(lambda n=number: len(list(folder.glob("*.mcap"))) == n, "the file")
            durations.append(time.monotonic() - begun)
            writing.append(jitter(watch, have))
            resume(watch)
            have = len(watch.commands)
            time.sleep(REST_S)
            resting.append(jitter(watch, have))
        memory = memory_mb(executor.pid)
    busy, quiet = np.concatenate(writing), np.concatenate(resting)
    files = list(folder.glob("*.mcap"))
    return {
        "resting_jitter_p99_ms": float(np.percentile(quiet, 99)),
        "writing_jitter_p99_ms": float(np.percentile(busy, 99)),
        "added_p99_ms": float(np.percentile(busy, 99) - np.percentile(quiet, 99)),
        "resting_jitter_max_ms": float(quiet.max()),
        "writing_jitter_max_ms": float(busy.max()),
        "commands_while_writing": float(len(busy)),
        "commands_while_resting": float(len(quiet)),
        "write_s": float(np.median(durations)),
        "file_mb": float(np.median([f.stat().st_size for f in files])) / 1e6,
        "executor_memory_mb": memory,
        "load": os.getloadavg()[0],
    }


def jitter(watch: Watcher, since: int) -> np.ndarray:
    return np.abs(np.diff(stamps_ms(watch.commands[since:])) - PERIOD_MS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=15, help="how often (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args()
    dds.apply(loopback=True)
    os.environ.setdefault("ROS_DOMAIN_ID", "96")
    watch = Watcher()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(watch, Path(folder), args.stops)
    finally:
        watch.close()
    missed = [t for t in TARGETS if figures[t.figure] > t.limit]
    limits = {t.figure: t for t in TARGETS}
    for name, value in figures.items():
        target = limits.get(name)
        told = f"<= {target.limit:g}: {target.reason}" if target else ""
        print(f"{name:26}{value:10.3f}  {told}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(
        f"{len(TARGETS) - len(missed)} of {len(TARGETS)} targets met"
        + (f", missed: {', '.join(t.figure for t in missed)}" if missed else "")
    )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
