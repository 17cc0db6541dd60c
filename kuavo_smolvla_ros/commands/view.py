"""Look at an episode of a dataset: its pictures, and every joint's state beside its action.

Opens the rerun viewer, or writes a recording that it opens elsewhere (a machine without a screen).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from kuavo_smolvla_ros.errors import UsageError, UserError

EPILOG = """examples:
  kuavo-smolvla view datasets/weighing --episode 3
  kuavo-smolvla view datasets/weighing --episode 3 --save episode_3.rrd

exit status: 0 done, 1 the dataset cannot be read, 2 used wrongly"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("dataset", type=Path, help="folder of a LeRobot v3.0 dataset")
    parser.add_argument("--episode", type=int, default=0, metavar="N", help="which one (default 0)")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write FILE (.rrd) instead of opening a viewer"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from kuavo_smolvla_ros.data import view
    except ImportError as error:
        if error.name is None or not error.name.startswith("rerun"):
            raise
        raise UserError("this needs rerun: pip install 'kuavo_smolvla_ros[view]'") from None
    if args.episode < 0:
        raise UsageError(f"--episode {args.episode}: episodes count from 0")
    if args.save is None:
        shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if sys.platform.startswith("linux") and not shown:
            raise UsageError("a viewer needs a display, and DISPLAY is not set; use --save FILE.rrd instead")
        view.show_episode(args.dataset, args.episode)
        return 0
    if args.save.suffix != ".rrd":
        raise UsageError(f"--save {args.save}: rerun's recordings end in .rrd")
    args.save.parent.mkdir(parents=True, exist_ok=True)
    view.save_episode(args.dataset, args.episode, args.save)
    print(f"episode {args.episode} of {args.dataset} -> {args.save} (open with: rerun {args.save})")
    return 0
