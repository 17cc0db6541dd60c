"""What the optional levers of the fast path do to a trained policy's chunks, in radians.

    python benchmarks/levers.py --checkpoint outputs/train/smolvla_sequential/task1_moving_grasp/best

Scenes come from the simulator: the scripted expert plays the task, and at some moments the policy is asked
for a chunk with the same noise by each variant. Shown is how far the arm joints are from the plain float32
answer, and beside it how far another draw of the noise moves them: what is far below that cannot matter. With
--episodes each variant also plays so many, with the same seeds; all chunks take the same simulated time, so
that is what accuracy costs, without what speed brings. A lever that changes pictures must be trained with to
be judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kuavo_smolvla_ros.errors import UserError
from kuavo_smolvla_ros.experiment.play import Manner
from kuavo_smolvla_ros.experiment.trials import Trial, TrialSettings, play_episodes
from kuavo_smolvla_ros.policy.quantized import why_not_int8
from kuavo_smolvla_ros.policy.runtime import PolicyRunner
from kuavo_smolvla_ros.policy.sampler import SamplerOptions
from kuavo_smolvla_ros.sim import kuavo
from kuavo_smolvla_ros.sim.cameras import ROLES, sizes
from kuavo_smolvla_ros.sim.experts import make_expert
from kuavo_smolvla_ros.sim.simulation import ARM_INDICES, Simulation
from kuavo_smolvla_ros.sim.tasks import make_task

MOMENTS_S = (0.5, 2.0, 4.0, 6.0)
FIRST_SEED = 1000  # of the episodes: no demonstration has these
SHARE_OF_SPREAD = 0.1


class Scene(NamedTuple):
    images: dict[str, np.ndarray]
    state: np.ndarray
    sentence: str


class Target(NamedTuple):
    variant: str
    reason: str


# Of the rms by which another noise sample moves the chunk.
TARGETS = (
    Target("bfloat16", "rounding must vanish beside what chance decides"),
    Target("int8", "the same, or it is not worth its speed"),
    Target("unchanged pictures reused", "exact"),
)


def scenes(task: int, seeds: int, shape: tuple[int, int]) -> Iterator[Scene]:
    """Moments of the expert's episodes, pictures of this height and width."""
    sim = Simulation(make_task(task), sizes(*shape))
    try:
        for seed in range(seeds):
            sim.reset(seed)
            expert = make_expert(sim, seed)
            for moment in MOMENTS_S:
                while sim.time_s < moment - 0.5 * kuavo.POLICY_PERIOD_S:
                    sim.act(expert.action())
                yield Scene(sim.images(), sim.state(), sim.task.instruction)
    finally:
        sim.close()


def variants(size: tuple[int, int], unit: int) -> dict[str, SamplerOptions]:
    """By name; `size` (width, height) is the policy's own, `unit` what sides must be multiples of."""
    smaller = (size[0] * 3 // 4 // unit * unit, size[1] * 3 // 4 // unit * unit)
    found = {
        "bfloat16": SamplerOptions(dtype="bfloat16"),
        "int8": SamplerOptions(dtype="int8"),
        "4 steps": SamplerOptions(dtype="float32", steps=4),
        "2 steps": SamplerOptions(dtype="float32", steps=2),
        f"{smaller[0]} x {smaller[1]} pixels, not {size[0]} x {size[1]}": SamplerOptions(
            dtype="float32", image_size=smaller
        ),
        "unpadded": SamplerOptions(dtype="float32", unpadded=True),
        "unchanged pictures reused": SamplerOptions(dtype="float32", reuse_unchanged=True),
    }
    if why_not_int8() is not None:
        del found["int8"]
    return found


def chunks(runner: PolicyRunner, seen: list[Scene], seed: int) -> np.ndarray:
    return np.array([runner.chunk(s.images, s.state, s.sentence, seed=seed)[:, ARM_INDICES] for s in seen])


def successes(args: argparse.Namespace, options: SamplerOptions) -> int:
    """Of the episodes, in realtime mode through the executor that drives the robot."""
    manner = Manner(noise_scale=args.noise_scale)
    episodes = play_episodes(
        Trial(args.checkpoint, args.task),
        TrialSettings(manner=manner),
        (args.height, args.width),
        range(FIRST_SEED, FIRST_SEED + args.episodes),
        options=options,
    )
    return sum(episode["success"] for episode in episodes)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    plain = PolicyRunner.load(args.checkpoint, options=SamplerOptions(dtype="float32"))
    config = plain.policy.config
    if sorted(config.cameras) != sorted(ROLES):
        raise UserError(f"the policy sees {', '.join(config.cameras)}; the simulator has {', '.join(ROLES)}")
    seen = list(scenes(args.task, args.seeds, (args.height, args.width)))
    expected = chunks(plain, seen, 0)
    other = np.concatenate([chunks(plain, seen, seed) - expected for seed in (1, 2, 3)])
    errors, played = {"another noise sample": other}, {}
    if args.episodes:
        played["another noise sample"] = successes(args, SamplerOptions(dtype="float32"))
    sizes_of = plain.policy.model.architecture
    unit = sizes_of.vision.patch_size * sizes_of.shuffle
    for name, options in variants(config.image_size, unit).items():
        runner = PolicyRunner.load(args.checkpoint, options=options)
        try:
            errors[name] = chunks(runner, seen, 0) - expected
            if args.episodes:
                played[name] = successes(args, options)
        except UserError as error:
            print(f"{name}: not possible with this network and these pictures: {error}")
    return {
        name: {
            "largest_rad": float(np.abs(error).max()),
            "rms_rad": float(np.sqrt(np.square(error).mean())),
            "rms_begin_rad": float(np.sqrt(np.square(error[:, : config.n_action_steps]).mean())),
            **({"successes": played[name]} if name in played else {}),
        }
        for name, error in errors.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or hub id of a trained policy of the simulated robot")
    parser.add_argument("--task", type=int, default=1, help="whose scenes (default 1)")
    parser.add_argument("--seeds", type=int, default=4, help="episodes, four moments of each (default 4)")
    parser.add_argument("--height", type=int, default=480, help="of the pictures (default 480)")
    parser.add_argument("--width", type=int, default=640, help="of the pictures (default 640)")
    parser.add_argument(
        "--episodes", type=int, default=0, metavar="N", help="also play so many with each (default 0)"
    )
    parser.add_argument("--noise-scale", type=float, default=0.5, help="of the episodes (default 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        print("levers: not measured: it needs a trained policy, --checkpoint")
        return 0
    try:
        found = measure(args)
    except UserError as error:
        print(f"levers: {error}", file=sys.stderr)
        return 2
    spread = found["another noise sample"]["rms_rad"]
    print(f"{'':40}{'largest rad':>12}{'rms rad':>10}{'first steps':>13}{'successes':>11}")
    for name, entry in found.items():
        figures = f"{entry['largest_rad']:>12.4f}{entry['rms_rad']:>10.4f}{entry['rms_begin_rad']:>13.4f}"
        of = f"{entry['successes']} of {args.episodes}" if "successes" in entry else ""
        print(f"{name:40}{figures}{of:>11}")
    short = [
        f"{target.variant} {found[target.variant]['rms_rad']:.4f} rad ({target.reason})"
        for target in TARGETS
        if target.variant in found and found[target.variant]["rms_rad"] > SHARE_OF_SPREAD * spread
    ]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"levers: {args.checkpoint}: {'short: ' + '; '.join(short) if short else 'all targets met'}")
    return 1 if args.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
