#!/usr/bin/env python3
"""Train a delta expert on a stage's best checkpoint: it refines the chunk of the frozen policy.

What the frozen policy says of each frame is computed once and kept, so a step costs a fraction of the stage's
own. Values of config/policy/delta_expert.yaml are set as delta.key=value; all others as for
train_sequential.py, and they must be those the stage was trained with where they say what its data is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from kuavo_smolvla_ros.errors import exit_status

EPILOG = """examples:
  python training/train_delta_expert.py task=tasks/task2_weighing
  python training/train_delta_expert.py task=tasks/NAME run.batch_size=64 delta.policy.use_cls_head=true
  accelerate launch --config_file config/accelerate/gpus.yaml training/train_delta_expert.py task=tasks/NAME

exit status: 0 trained, or stopped by Ctrl-C or SIGTERM and saved; 1 training or data failed; 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="task=tasks/NAME, and any setting")
    parser.add_argument("--restart", action="store_true", help="delete what it has made before, begin anew")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.learning.delta_stage import read_delta_request

    request = read_delta_request(args.overrides)
    from kuavo_smolvla_ros.learning.curriculum_run import make_accelerator
    from kuavo_smolvla_ros.learning.delta_run import train_delta
    from kuavo_smolvla_ros.learning.interruption import interruptible
    from kuavo_smolvla_ros.learning.lerobot_source import open_task
    from kuavo_smolvla_ros.video_decoder import choose_video_backend

    def opened(task: Any, chunk: int) -> Any:
        return open_task(task, chunk, video_backend=choose_video_backend())

    accelerator = make_accelerator([request.stage], request.run)
    with interruptible() as interruption:
        train_delta(
            request,
            accelerator,
            opened,
            interruption=interruption,
            restart=args.restart,
            say=accelerator.print,
        )
    accelerator.end_training()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_status("train_delta_expert", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
