#!/usr/bin/env python3
"""Four ways to train four tasks, held against each other by what the policies then do in the simulator.

With the tiny network and on a CPU this takes hours. Everything is kept as it comes: interrupted, the same
command goes on. The result is results.md in the output folder, with pictures; docs/results.md is one of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """example:
  python training/experiment.py                                        # all of it, in outputs/experiment
  python training/experiment.py --ways curriculum no_replay            # only these
  python training/experiment.py --demonstrations 300 --steps 20000 --trials 200 --device cuda

exit status: 0 finished, or stopped by a signal and kept; 1 a step failed; 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from kuavo_smolvla_ros.experiment.road import PARTS
    from kuavo_smolvla_ros.experiment.ways import TASK_FILES, WAYS, TrainingSettings

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/experiment"), metavar="FOLDER")
    parser.add_argument("--demonstrations", type=int, default=200, help="of each task (default 200)")
    parser.add_argument("--seeing-steps", type=int, default=3600, help="of learning to see (default 3600)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=list(TrainingSettings.steps),
        metavar="N",
        help=f"of all stages, or of each (default {' '.join(map(str, TrainingSettings.steps))})",
    )
    parser.add_argument("--trials", type=int, default=50, help="of each policy at each task (default 50)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the road (default all)"
    )
    parser.add_argument("--latency", type=float, default=0.1, help="seconds to a chunk (default 0.1)")
    parser.add_argument("--n-action-steps", type=int, default=4, help="between looks (default 4)")
    parser.add_argument(
        "--noise-scale", type=float, default=0.5, help="of the noise a chunk begins with (default 0.5)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that play trials (default 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write results.md and SVGs here")
    args = parser.parse_args(argv)
    if len(args.steps) == 1:
        args.steps *= len(TASK_FILES)
    if len(args.steps) != len(TASK_FILES) or min(args.steps) < 1:
        parser.error(f"--steps takes one number, or one for each of {len(TASK_FILES)} stages, at least 1")
    for name in ("demonstrations", "seeing_steps", "trials", "n_action_steps", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    return args


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.experiment.road import Experiment

    try:
        Experiment.of(args).run(args.only)
    except KeyboardInterrupt:
        print("experiment: stopped; what is done is kept, and the same command goes on", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from kuavo_smolvla_ros.errors import exit_status

    args = parse(argv)
    return exit_status("experiment", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
