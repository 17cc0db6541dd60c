#!/usr/bin/env python3
"""Train the curriculum: a stage, or all in a row; what is finished is skipped, what was stopped goes on.

Every value of config/policy/smolvla_sequential_base.yaml and of the tasks' files can be set as key=value.
A task of your own is a file of your own (docs/tutorial.md); task=FILE.yaml trains it after the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from kuavo_smolvla_ros.errors import exit_status

EPILOG = """examples:
  python training/train_sequential.py task=tasks/task1_moving_grasp policy.unfreeze_vision_layers='[-1,-2,-3]'
  python training/train_sequential.py stages=all --dry-run
  accelerate launch --config_file config/accelerate/gpus.yaml training/train_sequential.py stages=all
  python training/train_sequential.py stages=all --reference no_replay
  python training/train_sequential.py task=mine/task5_lift_block.yaml
  python training/train_sequential.py task=mine/task5.yaml 'curriculum=[mine/task5.yaml]' init=pretrained

exit status: 0 trained, or stopped by Ctrl-C or SIGTERM and saved; 1 training or data failed; 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="task=tasks/NAME, task=FILE.yaml or stages=all, and any setting",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument(
        "--restart", action="store_true", help="delete what the chosen stages have made, begin anew"
    )
    parser.add_argument(
        "--reference",
        choices=("no_replay", "joint", "single"),
        help="train this reference in place of the curriculum: no replay, all tasks at once, each task alone",
    )
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.learning.stage_config import read_request

    overrides = [text for text in args.overrides if text not in ("dry_run=true", "dry_run=True")]
    request = read_request(overrides)
    from kuavo_smolvla_ros.learning.curriculum_run import (
        make_accelerator,
        reference_root,
        reference_stages,
        run_stages,
    )
    from kuavo_smolvla_ros.learning.interruption import interruptible
    from kuavo_smolvla_ros.learning.lerobot_source import open_task
    from kuavo_smolvla_ros.video_decoder import choose_video_backend

    stages = reference_stages(request.curriculum, args.reference)
    selected = tuple(s.name for s in stages) if args.reference == "joint" else request.selected
    root = reference_root(request.run.root, args.reference)
    settings = dataclasses.replace(request.run, output_root=str(root))

    def opened(task: Any, chunk: int) -> Any:
        return open_task(task, chunk, video_backend=choose_video_backend())

    if args.dry_run or len(overrides) < len(args.overrides):
        return rehearse([s for s in stages if s.name in selected], settings, opened)
    chosen = [stage for stage in stages if stage.name in selected]
    accelerator = make_accelerator(chosen, settings)
    with interruptible() as interruption:
        run_stages(
            stages,
            settings,
            accelerator,
            opened,
            interruption=interruption,
            selected=selected,
            shared=request.run.root,
            restart=args.restart,
            say=accelerator.print,
        )
    accelerator.end_training()
    return 0


def rehearse(stages: Sequence[Any], settings: Any, opened: Any) -> int:
    """Print what each stage would do."""
    import torch

    from kuavo_smolvla_ros.learning.curriculum_run import chunk_size
    from kuavo_smolvla_ros.learning.estimate import stage_plan
    from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
    from kuavo_smolvla_ros.learning.stage_policy import stage_config

    for stage in stages:
        sources = {task.name: opened(task, chunk_size(stage)) for task in stage.tasks}
        manager = ReplayDatasetManager(stage, sources)
        config = stage_config(stage, manager.facts, "cpu", settings.robot)
        for line in stage_plan(stage, manager, config, settings, max(torch.cuda.device_count(), 1)):
            print(line)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_status("train_sequential", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
