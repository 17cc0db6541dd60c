"""How fast the simulated Kuavo runs, that it repeats itself bit for bit, and how often its experts succeed.

python benchmarks/sim.py                    speed and determinism, about a minute
python benchmarks/sim.py --experts          also the experts' success over 200 seeds per task and level
python benchmarks/sim.py --check            exit 1 where a figure falls short of its target
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kuavo_smolvla_ros.sim.cameras import sizes
from kuavo_smolvla_ros.sim.episode import run_expert
from kuavo_smolvla_ros.sim.simulation import Simulation
from kuavo_smolvla_ros.sim.task import Level
from kuavo_smolvla_ros.sim.tasks import TASKS, make_task

# name: (how many times real time, why). "small" is with three small cameras at 10 Hz.
SPEED_TARGETS = {
    "physics": (30.0, "thousands of episodes have to fit into a night on a laptop"),
    "small": (10.0, "a policy's closed-loop evaluation must not wait for its pictures"),
}
# A demonstration that fails is thrown away; below this the ones kept are too much the easy ones.
EXPERT_SUCCESS = {Level.EASY: 0.98, Level.CONTEST: 0.90}
COLUMNS = ("physics", "expert", "small", "large")
SMALL, LARGE = (96, 128), (480, 640)
REPEATS = 5
RECORDED_SEED = 1
Actions = list[NDArray[np.float64]]


def recorded(number: int) -> Actions:
    """An expert's episode as actions, to time the simulation and not the expert's thinking."""
    actions: Actions = []
    run_expert(Simulation(make_task(number)), RECORDED_SEED, on_step=actions.append)
    return actions


def play(sim: Simulation, actions: Actions, each: Callable[[], Any] | None = None) -> None:
    sim.reset(RECORDED_SEED)
    for action in actions:
        sim.act(action)
        if each is not None:
            each()


def times_real_time(run: Callable[[], Any], simulated_s: float) -> dict[str, float]:
    """Simulated seconds per second of the clock and of CPU time of all threads, medians of some runs.

    What others take of a busy machine counts against the first and not against the second.
    """
    by_clock, by_cpu = [], []
    for _ in range(REPEATS):
        clock, cpu = time.perf_counter(), time.process_time()
        run()
        by_clock.append(simulated_s / (time.perf_counter() - clock))
        by_cpu.append(simulated_s / (time.process_time() - cpu))
    return {"clock": statistics.median(by_clock), "cpu": statistics.median(by_cpu)}


def measure_speed(number: int) -> dict[str, dict[str, float]]:
    actions = recorded(number)
    seconds = 0.1 * len(actions)
    blind = Simulation(make_task(number))
    figures = {
        "physics": times_real_time(lambda: play(blind, actions), seconds),
        "expert": times_real_time(lambda: run_expert(blind, RECORDED_SEED), seconds),
    }
    for name, size in (("small", SMALL), ("large", LARGE)):
        seeing = Simulation(make_task(number), sizes(*size))
        play(seeing, actions[:5], seeing.images)
        figures[name] = times_real_time(partial(play, seeing, actions, seeing.images), seconds)
        seeing.close()
    return figures


def trajectory_hash(number: int) -> str:
    """Every position of an expert's contest episode on its way, as one hash."""
    digest = hashlib.sha256()
    sim = Simulation(make_task(number, Level.CONTEST))
    run_expert(sim, 7, watch=lambda: digest.update(sim.data.qpos.tobytes()))
    return digest.hexdigest()


def repeats_itself(number: int) -> bool:
    """The same episode twice here and once in another process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        elsewhere = pool.submit(trajectory_hash, number).result()
    return trajectory_hash(number) == trajectory_hash(number) == elsewhere


def one_expert_episode(job: tuple[int, str, int]) -> tuple[int, str, int, bool, float, float]:
    number, level, seed = job
    sim = _simulation(number, level)
    episode = run_expert(sim, seed)
    return number, level, seed, episode.score.success, episode.score.total, episode.time_s


_simulations: dict[tuple[int, str], Simulation] = {}


def _simulation(number: int, level: str) -> Simulation:
    if (number, level) not in _simulations:
        _simulations[number, level] = Simulation(make_task(number, level))
    return _simulations[number, level]


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a rate; honest near 0 and 1, where the usual one is not."""
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return centre - half, centre + half


def measure_experts(tasks: Iterable[int], seeds: int, jobs: int) -> list[dict[str, Any]]:
    work = [(number, level.value, seed) for number in tasks for level in Level for seed in range(seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        results = list(
            tqdm(
                pool.map(one_expert_episode, work, chunksize=5), total=len(work), unit="episode", leave=False
            )
        )
    rows = []
    for number in tasks:
        for level in Level:
            mine = [row for row in results if row[:2] == (number, level.value)]
            succeeded = [row for row in mine if row[3]]
            low, high = wilson(len(succeeded), len(mine))
            rows.append(
                {
                    "task": number,
                    "level": level.value,
                    "episodes": len(mine),
                    "success": len(succeeded) / len(mine),
                    "interval": [low, high],
                    "mean_points": statistics.mean(row[4] for row in mine),
                    "median_time_s": statistics.median([row[5] for row in succeeded] or [math.nan]),
                    "failed_seeds": [row[2] for row in mine if not row[3]],
                    "target": EXPERT_SUCCESS[level],
                }
            )
    return rows


def report_speed(tasks: Iterable[int], figures: dict[str, Any], short: list[str]) -> None:
    print("simulated seconds per second of the clock / of CPU time; expert: with its thinking;")
    print(f"small, large: with three cameras of {SMALL[1]}x{SMALL[0]}, {LARGE[1]}x{LARGE[0]} at 10 Hz")
    print(f"{'task':>4} " + " ".join(f"{name:>15}" for name in COLUMNS) + "  same bits")
    for number in tasks:
        speed = figures["speed"][number] = measure_speed(number)
        same = figures["deterministic"][number] = repeats_itself(number)
        columns = (f"{speed[name]['clock']:>7.1f} /{speed[name]['cpu']:>6.1f}" for name in COLUMNS)
        print(f"{number:>4} {' '.join(columns)}  {'yes' if same else 'NO'}", flush=True)
        for name, (target, _) in SPEED_TARGETS.items():
            if speed[name]["cpu"] < target:
                short.append(f"task {number}: {name} {speed[name]['cpu']:.1f}x < {target:g}x")
        if not same:
            short.append(f"task {number}: the same seed gave another trajectory")


def report_experts(rows: list[dict[str, Any]], short: list[str]) -> None:
    print(
        f"\n{'task':>4} {'level':>8} {'success':>8} {'95 % interval':>16} {'points':>7} {'time s':>7}  failed"
    )
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['task']:>4} {row['level']:>8} {row['success']:>8.1%} {low:>8.1%}{high:>8.1%} "
            f"{row['mean_points']:>7.1f} {row['median_time_s']:>7.1f}  {row['failed_seeds'] or 'none'}"
        )
        if row["success"] < row["target"]:
            short.append(f"task {row['task']} {row['level']}: {row['success']:.1%} < {row['target']:.0%}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/sim.py --experts --seeds 200 --json outputs/sim.json --check",
    )
    parser.add_argument("--experts", action="store_true", help="measure the experts' success as well")
    parser.add_argument("--seeds", type=int, default=200, help="episodes per task and level (default 200)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes for --experts")
    parser.add_argument("--tasks", type=int, nargs="+", default=sorted(TASKS), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        parser.error("--seeds and --jobs must be 1 or more")
    unknown = sorted(set(args.tasks) - set(TASKS))
    if unknown:
        parser.error(f"there is no task {unknown[0]}; choose from {', '.join(map(str, sorted(TASKS)))}")
    return args


def main() -> int:
    args = parse_arguments()
    figures: dict[str, Any] = {"speed": {}, "deterministic": {}, "experts": []}
    short: list[str] = []
    report_speed(args.tasks, figures, short)
    if args.experts:
        figures["experts"] = measure_experts(args.tasks, args.seeds, args.jobs)
        report_experts(figures["experts"], short)
    figures["short"] = short
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print("sim: " + ("all targets met" if not short else "short of target: " + "; ".join(short)))
    return 1 if args.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
