"""`kuavo-smolvla`: one command, one subcommand per thing an operator does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from kuavo_smolvla_ros import __version__
from kuavo_smolvla_ros.errors import OK, exit_status

COMMANDS = {
    "demo": "walk the whole road in small: record simulated episodes, convert and judge them",
    "bringup": "start nodes together: policy and executor, a simulated Kuavo, or a recorder",
    "call": "call a node's service, or tell it a sentence, where ROS's own tools are not installed",
    "check": "compare a robot description with a bag or the live robot",
    "dataset": "look at, merge, divide, or take a part of datasets",
    "doctor": "report what this machine has, and what each missing thing disables",
    "report": "judge a dataset: a page of what is wrong with it, and an exit status",
    "view": "look at an episode of a dataset: pictures, states and actions (rerun)",
    "policy": "show a policy's parameters, freezing and memory",
    "replay": "decide again what the executor decided before a stop, and say what happened",
    "sim": "run an episode of a task in simulation and film it",
}

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kuavo-smolvla",
        description="Record, convert, train, check and run a language-conditioned policy on a Kuavo.",
        epilog="Exit status: 0 all is well, 1 the checked thing is bad, 2 used wrongly.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_line in COMMANDS.items():
        module = importlib.import_module(f"kuavo_smolvla_ros.commands.{name}")
        sub = subparsers.add_parser(
            name,
            help=help_line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return exit_status(f"kuavo-smolvla {args.command}", lambda: int(args.run(args)))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads what is printed has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


if __name__ == "__main__":
    sys.exit(main())
