"""Show what a policy consists of, what of it trains, and the memory a training step needs.

Needs neither weights nor a GPU: nothing is allocated.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kuavo_smolvla_ros.errors import UsageError, UserError
from kuavo_smolvla_ros.policy.freeze_presets import DEFAULT_PRESET, EXPERT_ONLY, FREEZE_PRESETS

if TYPE_CHECKING:
    from kuavo_smolvla_ros.policy.architecture import Architecture
    from kuavo_smolvla_ros.policy.freezing import FreezePlan, FreezeSettings

EPILOG = """example:
  kuavo-smolvla policy --backbone smolvlm2-500m --unfreeze '[-1,-2,-3,-4,-5,-6,-7,-8,-9]'
  kuavo-smolvla policy --checkpoint outputs/train/smolvla_sequential/task2_weighing/best --ratio 0.5
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--backbone", metavar="NAME", help="tiny, smolvlm2-500m (default), a folder, or a hub id"
    )
    model.add_argument(
        "--checkpoint", metavar="FOLDER", type=Path, help="a saved policy, with its own freezing"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--unfreeze", metavar="LIST", help="vision layers to train, such as '[-1,-2,-3]'")
    ways.add_argument("--freeze", metavar="LIST", help="vision layers to freeze, such as '[0,1,2]'")
    ways.add_argument(
        "--ratio", type=float, help="share of the vision layers to freeze, from the image on: 0..1"
    )
    ways.add_argument(
        "--preset", choices=(*FREEZE_PRESETS, EXPERT_ONLY), help=f"by name (default: {DEFAULT_PRESET})"
    )
    ways.add_argument("--episodes", type=int, metavar="N", help="the preset for a data set of N episodes")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="per device (default: 8)")
    parser.add_argument(
        "--cameras", type=int, default=3, metavar="N", help="pictures per sample (default: 3)"
    )
    parser.add_argument("--float32", action="store_true", help="memory without bfloat16 autocast")


def run(args: argparse.Namespace) -> int:
    for option in ("batch_size", "cameras"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it is at least 1")
    settings = _settings(args)
    if args.checkpoint is not None:
        _show_checkpoint(args, settings)
    else:
        _show_backbone(args, settings)
    return 0


def _show_backbone(args: argparse.Namespace, settings: FreezeSettings | None) -> None:
    import torch

    from kuavo_smolvla_ros.policy.architecture import read_architecture
    from kuavo_smolvla_ros.policy.backbone import resolve_backbone
    from kuavo_smolvla_ros.policy.freezing import FreezeSettings, count_parameters, format_table
    from kuavo_smolvla_ros.policy.network import SmolVLANetwork

    backbone = resolve_backbone(args.backbone or "smolvlm2-500m", weights=False)
    # The defaults of the policy's configuration, whose import would take longer than all of this.
    architecture = read_architecture(
        backbone.path, num_vlm_layers=16, expert_width_multiplier=0.75, self_attn_every_n_layers=2
    )
    plan = _plan(settings or FreezeSettings(preset=DEFAULT_PRESET), architecture)
    with torch.device("meta"):
        network = SmolVLANetwork(architecture, 32, 32)
    print(f"backbone {backbone.name}")
    print(format_table(plan, count_parameters(network, plan)), flush=True)
    _show_memory(args, architecture, plan)


def _show_checkpoint(args: argparse.Namespace, settings: FreezeSettings | None) -> None:
    from safetensors import safe_open

    from kuavo_smolvla_ros.policy.build import WEIGHTS_FILE, ensure_architecture
    from kuavo_smolvla_ros.policy.checkpoint import CHECKPOINT_FILE, CheckpointError, read_json
    from kuavo_smolvla_ros.policy.freezing import FreezePlan, count_sizes, format_table
    from kuavo_smolvla_ros.policy.plain_smolvla import read_config

    stored = read_config(args.checkpoint)
    config, weights = stored.config, args.checkpoint / WEIGHTS_FILE
    architecture = ensure_architecture(config)
    if settings is not None:
        plan = _plan(settings, architecture)
    elif stored.plain:
        plan = _plan(config.freezing, architecture)
    else:
        plan = FreezePlan.from_dict(read_json(args.checkpoint / CHECKPOINT_FILE)["freezing"])
    if not weights.is_file():
        raise CheckpointError(f"{args.checkpoint} holds no {WEIGHTS_FILE}")
    with safe_open(weights, framework="pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    print(f"checkpoint {args.checkpoint}, backbone {config.backbone}")
    print(format_table(plan, count_sizes(sizes, plan)), flush=True)
    _show_memory(args, architecture, plan)


def _show_memory(args: argparse.Namespace, architecture: Architecture, plan: FreezePlan) -> None:
    from kuavo_smolvla_ros.policy.memory import GIB, StepSizes, estimate_step

    if plan.extra_parts:
        print("memory of a training step: not estimated, the policy has parts beyond plain SmolVLA")
        return
    sizes = StepSizes(batch=args.batch_size, cameras=args.cameras, bfloat16=not args.float32)
    memory = estimate_step(architecture, plan, sizes)
    compute = "float32" if args.float32 else "bfloat16 autocast"
    print(f"\ntraining step, batch {sizes.batch}, {sizes.cameras} cameras, {compute}")
    print("\n".join(memory.lines()))
    print(
        f"needs about {memory.peak / GIB:.1f} GiB, and what the GPU's driver and libraries take (about 1 GiB)"
    )


def _settings(args: argparse.Namespace) -> FreezeSettings | None:
    """What the options ask for; None where they leave it open."""
    from kuavo_smolvla_ros.policy.freezing import FreezeSettings, preset_for_episodes

    try:
        if args.unfreeze is not None:
            return FreezeSettings(unfreeze_vision_layers=_layers("--unfreeze", args.unfreeze))
        if args.freeze is not None:
            return FreezeSettings(freeze_vision_layers=_layers("--freeze", args.freeze))
        if args.ratio is not None:
            return FreezeSettings(freeze_vision_ratio=args.ratio)
        if args.episodes is not None:
            return FreezeSettings(preset=preset_for_episodes(args.episodes))
    except UserError as error:
        raise UsageError(str(error)) from error
    return None if args.preset is None else FreezeSettings(preset=args.preset)


def _plan(settings: FreezeSettings, architecture: Architecture) -> FreezePlan:
    from kuavo_smolvla_ros.policy.freezing import FreezingError, plan_freezing

    try:
        return plan_freezing(settings, architecture.vision.layers)
    except FreezingError as error:
        raise UsageError(str(error)) from error


def _layers(option: str, text: str) -> list[int]:
    try:
        layers = json.loads(text)
    except ValueError:
        layers = None
    if not isinstance(layers, list):
        raise UsageError(
            f"{option} is {text!r}; it is a list of layer numbers in quotes, such as '[-1,-2,-3]'"
        )
    return layers
