#!/usr/bin/env python3
"""How often a checkpoint, or each stage of a curriculum, does each task in the simulator, with intervals.

What belongs to a curriculum is kept with it (success.json) and enters its report as the success matrix.

The same seeds mean the same episodes, so checkpoints can be compared pair by pair. Choose one on some seeds
and report it on others (--first-seed): the best of several looks better on the same episodes than it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PICTURE_HEIGHT, PICTURE_WIDTH = 480, 640  # the robot's own

EPILOG = """example:
  python training/evaluate.py outputs/train/smolvla_sequential/task4_sorting/best --episodes 50
  python training/evaluate.py outputs/train/smolvla_sequential --episodes 50 --workers 4     # all stages

exit status: 0 evaluated, 1 the checkpoint is not for this robot or the simulator failed, 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a checkpoint's or a curriculum's folder, or a hub id")
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N", help="default all four"
    )
    parser.add_argument("--episodes", type=int, default=20, help="of each task (default 20)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the episodes (default 0)")
    parser.add_argument("--level", default="easy", choices=("easy", "contest"))
    parser.add_argument(
        "--n-action-steps", type=int, help="executed of each chunk (default: the checkpoint's)"
    )
    parser.add_argument(
        "--noise-scale",
        type=float,
        help="of the noise a chunk begins with (default: the checkpoint's); 0: the same chunk for the same "
        "observation, often the more precise",
    )
    parser.add_argument(
        "--max-steps", type=int, help="end an episode after so many (default: the task's own)"
    )
    parser.add_argument("--device", default=None, help="default: the checkpoint's")
    parser.add_argument(
        "--workers", type=int, default=1, help="evaluations at a time, each a task (default 1)"
    )
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="keep a video of each failure here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all episodes as JSON")
    args = parser.parse_args(argv)
    if args.episodes < 1 or args.workers < 1:
        parser.error("--episodes and --workers are at least 1")
    return args


def evaluate_task(args: argparse.Namespace, checkpoint: str, number: int) -> dict[str, Any]:
    """All episodes of one task, in this process."""
    from kuavo_smolvla_ros.errors import UserError
    from kuavo_smolvla_ros.policy.runtime import PolicyRunner
    from kuavo_smolvla_ros.robot.spec import load_spec
    from kuavo_smolvla_ros.sim.cameras import sizes
    from kuavo_smolvla_ros.sim.simulation import Simulation
    from kuavo_smolvla_ros.sim.tasks import make_task

    runner = PolicyRunner.load(
        checkpoint,
        device=args.device,
        overrides={} if args.noise_scale is None else {"noise_scale": args.noise_scale},
    )
    config = runner.policy.config
    task = make_task(number, args.level)
    names = load_spec(task.robot).action_names
    if tuple(config.action_names[: len(names)]) != names:
        sentence = (
            f"task {number} needs the actions {', '.join(names)}; {checkpoint} begins with "
            f"{', '.join(config.action_names[: len(names)]) or 'actions without names'}"
        )
        if checkpoint != args.checkpoint:  # an early stage does not know the base's actions yet
            return {"task": number, "name": task.name, "impossible": sentence}
        raise UserError(sentence)
    executed = args.n_action_steps or config.n_action_steps
    if executed > config.chunk_size:
        raise UserError(f"--n-action-steps is {executed}, but a chunk has {config.chunk_size} steps")
    videos = None if args.videos is None else args.videos / stage_name(args, checkpoint)
    sim = Simulation(task, sizes(PICTURE_HEIGHT, PICTURE_WIDTH))
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    episodes = [run_episode(sim, runner, executed, seed, args.max_steps, videos) for seed in seeds]
    sim.close()
    return {"task": number, "name": task.name, "n_action_steps": executed, "episodes": episodes}


def stage_name(args: argparse.Namespace, checkpoint: str) -> str:
    """What sets a stage's videos apart from another's; nothing for a single checkpoint."""
    return "" if checkpoint == args.checkpoint else Path(checkpoint).parent.name


def run_episode(
    sim: Any, runner: Any, executed: int, seed: int, max_steps: int | None, videos: Path | None
) -> dict[str, Any]:
    """One episode from its seed to success or the end of its time."""
    import numpy as np

    from kuavo_smolvla_ros.sim.command import action_limits
    from kuavo_smolvla_ros.sim.film import Film
    from kuavo_smolvla_ros.sim.kuavo import POLICY_PERIOD_S

    lower, upper = action_limits(sim.task.mobile)
    limit = round(sim.task.time_limit_s / POLICY_PERIOD_S)
    limit = limit if max_steps is None else min(limit, max_steps)
    sim.reset(seed)
    video = None
    if videos is not None:
        videos.mkdir(parents=True, exist_ok=True)
        video = videos / f"task{sim.task.number}_seed{seed}.mp4"
    steps, score = 0, sim.score()
    with nullcontext() if video is None else Film(video, sim) as film:
        while not score.success and steps < limit:
            # A seed of its own for each inference, so that an episode is the same again.
            chunk = runner.chunk(sim.images(), sim.state(), sim.task.instruction, seed=seed * 10_000 + steps)
            for action in chunk[: min(executed, limit - steps), : len(lower)]:
                # Into the limits, as the robot's executor does.
                sim.act(np.clip(action, lower, upper), None if film is None else film.shoot)
                steps, score = steps + 1, sim.score()
                if score.success:
                    break
    if video is not None and score.success:
        video.unlink()
    return {"seed": seed, "success": bool(score.success), "score": float(score.total), "steps": steps}


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.learning.report import write_report
    from kuavo_smolvla_ros.learning.success import checkpoints_of, keep, stage_of, tally

    stages = [str(folder) for folder in checkpoints_of(Path(args.checkpoint).expanduser())]
    checkpoints = stages or [args.checkpoint]
    jobs = [(checkpoint, number) for checkpoint in checkpoints for number in args.tasks]
    if args.workers == 1:
        results = [evaluate_task(args, *job) for job in jobs]
    else:
        # Forked off a process that has only read the libraries: neither OpenGL nor CUDA survives a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["kuavo_smolvla_ros.policy.runtime", "kuavo_smolvla_ros.sim.simulation"]
        )
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            results = list(pool.map(evaluate_task, [args] * len(jobs), *zip(*jobs, strict=True)))
    by_checkpoint: dict[str, list[dict[str, Any]]] = {checkpoint: [] for checkpoint in checkpoints}
    for (checkpoint, _), result in zip(jobs, results, strict=True):
        where = f"{Path(checkpoint).parent.name}: " if stages else ""
        if "impossible" in result:
            print(f"{where}not evaluated: {result['impossible']}")
            continue
        result |= tally(result["episodes"])
        by_checkpoint[checkpoint].append(result)
        low, high = result["interval_95"]
        print(
            f"{where}task {result['task']} {result['name']}: {result['successes']} of {result['trials']} "
            f"({result['success']:.0%}, 95 % interval {low:.0%} to {high:.0%}), mean score "
            f"{result['mean_score']:.1f}, {result['n_action_steps']} of each chunk executed"
        )
    for checkpoint, found in by_checkpoint.items():
        folder = stage_of(Path(checkpoint).expanduser().resolve())
        if folder is not None and found:
            keep(
                folder,
                found,
                level=args.level,
                first_seed=args.first_seed,
                n_action_steps=args.n_action_steps,
                max_steps=args.max_steps,
            )
            report = write_report(curriculum_root(folder))
            print(f"kept in {folder}; report {report}")
    if args.json:
        contents = [
            {"checkpoint": checkpoint, "level": args.level, "tasks": found}
            for checkpoint, found in by_checkpoint.items()
        ]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"stages": contents} if stages else contents[0]
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def curriculum_root(stage_folder: Path) -> Path:
    """The folder whose report a stage belongs to; a reference's is the curriculum it is compared with."""
    above = stage_folder.parent
    return above.parent.parent if above.parent.name == "references" else above


def main(argv: Sequence[str] | None = None) -> int:
    from kuavo_smolvla_ros.errors import exit_status

    args = parse(argv)
    return exit_status("evaluate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
