"""What latency costs: success and time to finish of a moving-belt task, in turns and in real time.

    python benchmarks/closed_loop.py [--episodes 40] [--workers 2] [--results FILE] [--plot FILE] [--check]

A script stands for a perfect policy and answers after a latency that is played in simulated time; the belt it
picks from changes its speed and jerks sideways at random moments (`support/belt_pick.py`). Chunks are timed,
spliced and followed by the package's own code (`support/belt_loop.py`). Every cell sees the same seeds.

Results are appended to a file as they come in: what stands there already is not run again, so a run that was
stopped, or told to end after some --seconds, is continued by the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # episodes run side by side

from support.belt_loop import Cell, run_episode
from tqdm import tqdm

from kuavo_smolvla_ros.learning.metrics import wilson

LATENCIES_S = (0.0, 0.1, 0.3, 0.6, 1.2)
STEPS = (8, 16, 32)
"""At most chunk_size - 1.2 s of steps: a chunk must last until the next one is there."""
WHAT_COUNTS = ("support/belt_pick.py", "support/belt_loop.py")


class Target(NamedTuple):
    figure: str
    least: float
    reason: str


TARGETS = (
    Target(
        "success at once", 0.7, "without latency the script must solve the task, or the table says nothing"
    ),
    Target(
        "lost to latency, in turns", 0.1, "the trouble must cost something that only a fresh picture can save"
    ),
    Target(
        "realtime above in turns",
        0.0,
        "thinking while moving may not cost success against waiting, over all latencies from 0.1 s on",
    ),
    Target(
        "seconds saved by realtime", 0.0, "that is what it is for: the arms do not stand while one thinks"
    ),
)


def cells(latencies: Iterable[float] = LATENCIES_S, steps: Iterable[int] = STEPS) -> list[Cell]:
    return [Cell(*each) for each in product(latencies, steps, (False, True))]


def version() -> str:
    """Changes with what an episode is; results of another one are not mixed in."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in WHAT_COUNTS)).hexdigest()[:12]


def one(cell: Cell, seed: int) -> dict[str, Any]:
    return {"version": version(), **asdict(cell), "seed": seed, **asdict(run_episode(cell, seed))}


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("version", "latency_s", "n_action_steps", "realtime", "seed"))


def known(file: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What was run before; a line cut short by a kill is left out."""
    rows = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[key(row)] = row
    return rows


def run(wanted: list[tuple[Cell, int]], workers: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Episodes as they end, none begun after so many seconds."""
    if workers == 1:
        begun = time.monotonic()
        for cell, seed in wanted:
            if time.monotonic() - begun > seconds:
                return
            yield one(cell, seed)
        return
    waiting, begun = iter(wanted), time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(one, *task) for task, _ in zip(waiting, range(2 * workers), strict=False)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                task = next(waiting, None) if time.monotonic() - begun <= seconds else None
                if task is not None:
                    running.add(pool.submit(one, *task))


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry per cell: share of successes with its 95 % interval, and the successes' median time."""
    by_cell: dict[Cell, list[Mapping[str, Any]]] = {}
    for row in rows:
        cell = Cell(row["latency_s"], row["n_action_steps"], row["realtime"])
        by_cell.setdefault(cell, []).append(row)
    table = []
    for cell, found in sorted(by_cell.items(), key=lambda item: (item[0].n_action_steps, item[0].latency_s)):
        good = [row["time_s"] for row in found if row["success"]]
        interval = wilson(len(good), len(found))
        ends = [row["how"] for row in found if not row["success"]]
        table.append(
            {
                **asdict(cell),
                "mode": cell.mode,
                "episodes": len(found),
                "success": len(good) / len(found),
                "low": interval.low,
                "high": interval.high,
                "time_s": statistics.median(good) if good else None,
                "failures": {how: ends.count(how) for how in sorted(set(ends))},
            }
        )
    return table


def pooled(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same for all numbers of steps together: fewer figures, and more episodes in each."""
    return summary({**row, "n_action_steps": 0} for row in rows)


def overall(table: list[dict[str, Any]]) -> dict[str, float]:
    """The figures that targets are set for."""

    def mean(figure: str, **which: Any) -> float:
        latest = which.pop("at_least", 0.0)
        values = [
            row[figure]
            for row in table
            if row["latency_s"] >= latest and all(row[k] == v for k, v in which.items())
        ]
        values = [v for v in values if v is not None]
        return statistics.fmean(values) if values else float("nan")

    latencies = sorted({row["latency_s"] for row in table})
    least, most = latencies[0], latencies[-1]
    quickest = min(row["n_action_steps"] for row in table)
    later = latencies[1] if len(latencies) > 1 else least
    in_turns = {"realtime": False, "n_action_steps": quickest}
    return {
        "success at once": mean("success", latency_s=least, n_action_steps=quickest),
        "lost to latency, in turns": mean("success", latency_s=least, **in_turns)
        - mean("success", latency_s=most, **in_turns),
        "realtime above in turns": mean("success", realtime=True, at_least=later)
        - mean("success", realtime=False, at_least=later),
        "seconds saved by realtime": mean("time_s", realtime=False, at_least=later)
        - mean("time_s", realtime=True, at_least=later),
    }


def show(table: list[dict[str, Any]]) -> None:
    print(
        f"{'steps':>6}{'latency s':>11}{'mode':>13}{'episodes':>10}{'success':>9}{'95 %':>13}{'time s':>9}"
        "  failures"
    )
    for row in table:
        took = "-" if row["time_s"] is None else f"{row['time_s']:.1f}"
        failures = ", ".join(f"{how} {count}" for how, count in row["failures"].items())
        steps = row["n_action_steps"] or "all"
        print(
            f"{steps:>6}{row['latency_s']:>11.1f}{row['mode']:>13}{row['episodes']:>10}"
            f"{row['success']:>9.0%}{row['low']:>7.0%}..{row['high']:<4.0%}{took:>9}  {failures}"
        )


def draw(table: list[dict[str, Any]], file: Path) -> None:
    """Success above, time to finish below, a column for each number of steps."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps = sorted({row["n_action_steps"] for row in table})
    colours = {"realtime": "#1f6fb4", "synchronous": "#d1701c"}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "closed_loop", "font.size": 9}):
        figure = Figure((2.9 * len(steps) + 0.6, 4.4), layout="constrained")
        axes = figure.subplots(2, len(steps), sharex=True, sharey="row", squeeze=False)
        for column, count in enumerate(steps):
            for mode, colour in colours.items():
                rows = [r for r in table if r["n_action_steps"] == count and r["mode"] == mode]
                x = [r["latency_s"] for r in rows]
                top, below = axes[:, column]
                top.plot(x, [100 * r["success"] for r in rows], "o-", ms=4, color=colour, label=mode)
                top.fill_between(
                    x,
                    [100 * r["low"] for r in rows],
                    [100 * r["high"] for r in rows],
                    color=colour,
                    alpha=0.15,
                )
                below.plot(x, [r["time_s"] for r in rows], "o-", ms=4, color=colour)
            axes[0, column].set(title=f"{count} steps per chunk", ylim=(0, 102))
            axes[1, column].set(xlabel="latency (s)")
        axes[0, 0].set(ylabel="success (%)")
        axes[1, 0].set(ylabel="median time to finish (s)")
        axes[0, 0].legend(frameon=False, loc="lower left")
        for each in axes.flat:
            each.grid(alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/closed_loop.py --workers 2 --plot outputs/latency.svg",
    )
    parser.add_argument("--episodes", type=int, default=40, help="seeds in each cell (default 40)")
    parser.add_argument("--latencies", type=float, nargs="+", default=LATENCIES_S, metavar="S")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="N", help="n_action_steps")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no episode after so long")
    parser.add_argument(
        "--results", type=Path, default=Path("outputs/closed_loop.jsonl"), metavar="FILE",
        help="episodes, appended to and continued (default outputs/closed_loop.jsonl)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.svg or .png)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args(argv)
    if min(args.episodes, args.workers, *args.steps) < 1:
        parser.error("--episodes, --workers and --steps are at least 1")
    if min(args.latencies) < 0:
        parser.error("--latencies are at least 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    wanted = [(cell, seed) for seed in range(args.episodes) for cell in cells(args.latencies, args.steps)]
    rows = known(args.results)
    names = {(version(), c.latency_s, c.n_action_steps, c.realtime, seed): (c, seed) for c, seed in wanted}
    missing = [task for name, task in names.items() if name not in rows]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with (
        args.results.open("a", encoding="utf-8") as out,
        tqdm(total=len(names), initial=len(names) - len(missing), unit="episode") as bar,
    ):
        for row in run(missing, args.workers, args.seconds):
            rows[key(row)] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            bar.update()
    found = [rows[name] for name in names if name in rows]
    table = summary(found)
    show([*table, *pooled(found)])
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(table, args.plot)
    figures = overall(table)
    short = [
        f"{target.figure} is {figures[target.figure]:.2f}, not {target.least:g} ({target.reason})"
        for target in TARGETS
        if not figures[target.figure] >= target.least
    ]
    if len(found) < len(names):
        short.append(f"{len(names) - len(found)} of {len(names)} episodes are still to run: call again")
    told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    print(f"closed loop: {told}; {'short: ' + '; '.join(short) if short else 'all targets met'}")
    return 1 if args.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
