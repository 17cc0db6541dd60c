#!/usr/bin/env python3
"""What the CLS tokens of a delta expert have learnt, on held-out episodes: a picture, a page, numbers.

t-SNE by task, how alike the two views of a sample are, VICReg on samples it was not trained on, how well a
linear probe names the task, and over how many directions the tokens are spread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.errors import exit_status

EPILOG = """example:
  python training/analyse_cls.py task=tasks/task4_sorting --output outputs/cls

exit status: 0 written, 1 the checkpoint or the data cannot be used, 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as given to train_delta_expert.py")
    parser.add_argument("--checkpoint", help="default: the delta expert's best for this task")
    parser.add_argument("--frames", type=int, default=256, help="held-out frames per task (default 256)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    import dataclasses

    from kuavo_smolvla_ros.learning.curriculum_run import chunk_size
    from kuavo_smolvla_ros.learning.delta_run import delta_root
    from kuavo_smolvla_ros.learning.delta_stage import read_delta_request
    from kuavo_smolvla_ros.learning.lerobot_source import open_task
    from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
    from kuavo_smolvla_ros.learning.stage import BEST
    from kuavo_smolvla_ros.video_decoder import choose_video_backend

    request = read_delta_request(args.overrides)
    validation = dataclasses.replace(request.stage.validation, max_frames_per_task=args.frames)
    stage = dataclasses.replace(request.stage, validation=validation)
    backend, chunk = choose_video_backend(), chunk_size(stage)
    sources = {task.name: open_task(task, chunk, video_backend=backend) for task in stage.tasks}
    checkpoint = args.checkpoint or str(stage.folder(delta_root(request.run)) / BEST)
    for line in analyse(checkpoint, ReplayDatasetManager(stage, sources), request.run, args.output):
        print(line)
    return 0


def analyse(checkpoint: str, manager: Any, settings: Any, folder: Path) -> list[str]:
    """Write the analysis of a checkpoint on a stage's held-out frames; returns its sentences."""
    from kuavo_smolvla_ros.learning.cls_analysis import collect, reading, write_analysis
    from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

    overrides = {} if settings.device is None else {"device": settings.device}
    policy = KuavoSmolVLAPolicy.from_pretrained(checkpoint, overrides=overrides)
    table = collect(policy, held_out(policy, manager, settings))
    names = {task.number: task.name for task in manager.stage.tasks}
    return reading(write_analysis(table, names, folder, Path(checkpoint).parent.name))


def held_out(policy: Any, manager: Any, settings: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Batches of the held-out frames of all tasks, with noise that belongs to each frame."""
    from kuavo_smolvla_ros.learning.feed import ListedBatches, make_loader
    from kuavo_smolvla_ros.learning.mixed_dataset import FRAME, MixedDataset, validation_draws
    from kuavo_smolvla_ros.learning.validation import fixed_noise
    from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

    preprocess, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    samples, device = MixedDataset.of_manager(manager), next(policy.parameters()).device
    shape = (policy.config.chunk_size, policy.config.max_action_dim)
    for task, source in zip(manager.stage.tasks, manager.sources, strict=True):
        draws = validation_draws(manager, task)
        size = settings.batch_size
        batches = [draws[start : start + size] for start in range(0, len(draws), size)]
        for raw in make_loader(samples, ListedBatches(batches), settings, device):
            frames = raw[FRAME].tolist()
            noise, _ = fixed_noise(manager.stage.validation.seed, task.name, frames, 1, shape)
            numbers = [task.number] * len(frames)
            yield preprocess(raw), noise[:, 0].to(device), numbers, source.episodes[frames]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_status("analyse_cls", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
