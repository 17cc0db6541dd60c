#!/usr/bin/env python3
"""The four stages in small, on made-up tasks that conflict: no data, no downloads, minutes on two cores.

The tasks see the same and must move differently; only the instruction tells them apart. Trained with
replay, and with --reference no_replay without, the report shows what replay keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

EPILOG = """example:
  python training/rehearse_curriculum.py --output outputs/rehearsal
  python training/rehearse_curriculum.py --output outputs/rehearsal --reference no_replay

exit status: 0 trained, or stopped by a signal and saved; 1 training failed; 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--reference", choices=("no_replay", "joint", "single"), help="this in its place")
    parser.add_argument("--stages", type=int, default=4, help="only the first so many (default 4)")
    parser.add_argument("--epochs", type=int, default=16, help="of the first stage (default 16)")
    parser.add_argument("--batch-size", type=int, default=32, help="at a time, of 32 (default 32)")
    parser.add_argument(
        "--save-steps", type=int, default=1000, help="steps between checkpoints (default 1000)"
    )
    parser.add_argument(
        "--log-steps", type=int, default=10, help="steps between rows of the log (default 10)"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank in every stage")
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="write curves and matrices here as SVG"
    )
    parser.add_argument("--shard", action="store_true", help="divide what trains among the processes (FSDP)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.learning.curriculum_run import (
        make_accelerator,
        reference_root,
        reference_stages,
        run_stages,
    )
    from kuavo_smolvla_ros.learning.interruption import interruptible
    from kuavo_smolvla_ros.learning.report import write_figures
    from kuavo_smolvla_ros.learning.stage import Adapter
    from kuavo_smolvla_ros.learning.synthetic import conflicting_tasks, synthetic_curriculum, synthetic_run

    curriculum = synthetic_curriculum(args.epochs)
    if args.lora is not None:
        adapter = Adapter(args.lora, 2.0 * args.lora, ("q_proj", "v_proj"), dropout=0.1, lr=1e-2)
        curriculum = tuple(dataclasses.replace(stage, adapter=adapter) for stage in curriculum)
    sources = conflicting_tasks([stage.name for stage in curriculum])
    settings = synthetic_run(
        args.output,
        batch_size=args.batch_size,
        save_freq_steps=args.save_steps,
        log_freq_steps=args.log_steps,
        num_workers=args.workers,
        shard=args.shard,
    )
    settings = dataclasses.replace(settings, output_root=str(reference_root(settings.root, args.reference)))
    stages = reference_stages(curriculum, args.reference)[: args.stages]
    accelerator = make_accelerator(stages, settings)
    with interruptible() as interruption:
        run_stages(
            stages,
            settings,
            accelerator,
            lambda task, chunk: sources[task.name],
            interruption=interruption,
            shared=args.output,
            say=accelerator.print,
        )
    accelerator.end_training()
    if args.figures is not None and accelerator.is_main_process:
        for file in write_figures(args.output, args.figures):
            print(file)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from kuavo_smolvla_ros.errors import exit_status

    args = parse(argv)
    return exit_status("rehearse_curriculum", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
