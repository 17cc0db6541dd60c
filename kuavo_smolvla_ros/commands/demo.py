"""Walk the whole road in small: record simulated episodes over ROS, convert and judge them, train the stages
in a row with a tiny network, evaluate, and let the result drive the simulated arms, told by sentences.

Everything happens on this machine. What was interrupted goes on where it was; a page and a summary of what
was done stand at the end, and grow with each step. Tasks that are not the first of the curriculum, or one
episode of each, cannot be trained on: the road then ends with the judged data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kuavo_smolvla_ros.errors import UsageError, UserError

EPILOG = """examples:
  kuavo-smolvla demo
  kuavo-smolvla demo --quick           # seconds; needs neither the simulator nor ROS
  kuavo-smolvla demo --until report    # ends with the judged data, without training
  kuavo-smolvla demo --tasks 1 --episodes 1 --out outputs/one

exit status: 0 done, 1 something failed, 2 used wrongly"""

NEEDED = {"rclpy": "ros", "mujoco": "sim", "mink": "sim", "rosbags": "bags", "av": "bags"}
TRAINING = {"lerobot": "train"}
UNTRAINED = ("check", "record", "convert", "report")  # steps before the training


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    parser.add_argument("--quick", action="store_true", help="only the first step: a made-up recording")
    parser.add_argument(
        "--until",
        metavar="STEP",
        help="check, record, convert, report, train, evaluate or drive (default: all)",
    )
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="default: all"
    )
    parser.add_argument("--episodes", type=int, default=2, metavar="N", help="of each task (default 2)")
    parser.add_argument(
        "--real-time-factor",
        type=float,
        default=0.0,
        metavar="X",
        help="of the simulator; 0, the default: as fast as pictures are drawn, and none is left out",
    )


def run(args: argparse.Namespace) -> int:
    import importlib.util

    unknown = sorted(set(args.tasks) - {1, 2, 3, 4})
    if unknown:
        raise UsageError(f"--tasks: there is no task {unknown[0]}; choose of 1, 2, 3, 4")
    if args.episodes < 1 or not 0 <= args.real_time_factor <= 100:
        raise UsageError("--episodes is at least 1, and --real-time-factor from 0 to 100")
    needed = {"rosbags": "bags"} if args.quick else NEEDED | ({} if args.until in UNTRAINED else TRAINING)
    missing = sorted({extra for module, extra in needed.items() if importlib.util.find_spec(module) is None})
    if missing:
        raise UserError(f"this needs more: pip install 'kuavo_smolvla_ros[{','.join(missing)}]'")
    from kuavo_smolvla_ros.demo.check import CheckStep
    from kuavo_smolvla_ros.demo.steps import PAGE, steps, walk

    root = args.out.absolute()
    road = steps(sorted(set(args.tasks)), args.episodes, real_time_factor=args.real_time_factor)
    names = [step.name for step in road]
    last = CheckStep.name if args.quick else args.until or names[-1]
    if last not in names:
        raise UsageError(
            f"--until: there is no step '{last}' here; choose one of {', '.join(names)} (training needs the "
            "first tasks of the curriculum, and two episodes of each)"
        )
    root.mkdir(parents=True, exist_ok=True)
    try:
        walk(root, road[: names.index(last) + 1], lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to go on ({args.out / PAGE} shows what is done)")
        return 130
    print(f"see {args.out / PAGE}")
    return 0
