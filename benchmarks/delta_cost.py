#!/usr/bin/env python3
"""What refining costs beside making a chunk, and a training step on the base's outputs beside the base's own.

Random weights of the chosen size: cost does not depend on what they are. Each time is a median over rounds
in which all are measured in turn. Operations are counted beside it, on tensors without contents, which takes
seconds at any size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EPILOG = """example:
  python benchmarks/delta_cost.py --backbone smolvlm2-500m --rounds 3 --json outputs/delta_cost.json --check

exit status: 0 measured (and with --check no target missed), 1 a target missed, 2 used wrongly
"""
# Refining the rest of a chunk is for the steps between two chunks: it must fit there many times. The
# published correction head takes 1/21 of its base (4.7 of 101 ms on a GPU).
CHEAP_SHARE = 0.1
# A step on cached outputs runs no vision, no expert and no denoising: the published arithmetic is 1/5 to 1/7
# where the language model still runs.
STEP_SHARE = 0.5
CAMERAS = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="smolvlm2-500m", help="default smolvlm2-500m")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--count-only", action="store_true", help="operations only, no times")
    parser.add_argument("--batch", type=int, default=2, help="samples of a training step (default 2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.batch < 2:
        parser.error("--rounds is at least 1 and --batch at least 2")
    return args


def count(args: argparse.Namespace) -> dict[str, float]:
    """Floating-point operations of each, in units of 10^9, by torch's own counter."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from kuavo_smolvla_ros.policy.delta_expert import displacement, read_context
    from kuavo_smolvla_ros.policy.delta_network import DeltaNetwork
    from kuavo_smolvla_ros.policy.expert import prepare_expert, velocity
    from kuavo_smolvla_ros.policy.freezing import apply_plan
    from kuavo_smolvla_ros.policy.prefix import (
        append_state,
        context_embeddings,
        embed_images,
        run_context,
    )

    config = _config(args, train_delta_expert=True)
    found: dict[str, float] = {}
    side = config.image_size[0]
    with FakeTensorMode():
        network = DeltaNetwork(config.architecture, config.max_state_dim, config.max_action_dim, config.delta)
        pixels = torch.empty(1, len(CAMERAS), 3, side, side)
        tokens = torch.zeros(1, config.tokenizer_max_length, dtype=torch.long)
        real = torch.ones(1, config.tokenizer_max_length, dtype=torch.bool)
        state, time = torch.empty(1, config.max_state_dim), torch.empty(1)
        actions = torch.empty(1, config.chunk_size, config.max_action_dim)
        age = torch.zeros(1, dtype=torch.long)

        def counted(name: str, job: Callable[[], Any]) -> Any:
            counter = FlopCounterMode(display=False)
            with counter:
                result = job()
            found[name] = counter.get_total_flops() / 1e9
            return result

        with torch.no_grad():
            images = counted("pictures", lambda: embed_images(network, pixels))
            context = counted(
                "language model",
                lambda: run_context(network, *context_embeddings(network, images, tokens, real)),
            )
            counted(
                "ten denoising steps",
                lambda: [
                    velocity(network, cache, actions, time)
                    for cache in [
                        prepare_expert(network, append_state(network, context, state), config.chunk_size)
                    ]
                    for _ in range(config.num_steps)
                ],
            )
            read = read_context(network, context)
            counted("refining", lambda: displacement(network, read, actions, time, state, age))
        apply_plan(network, config.freeze_plan(len(network.vision.encoder.layers)))
        counted(
            "training the delta expert",
            lambda: displacement(network, read, actions, time, state, age).value.sum().backward(),
        )
        apply_plan(
            network,
            _config(args)
            .freeze_plan(len(network.vision.encoder.layers))
            .with_extra(
                dict.fromkeys(dict.fromkeys(n.split(".")[0] for n in network.delta_parameters()), False)
            ),
        )

        def base() -> None:
            cache = prepare_expert(network, append_state(network, context, state), config.chunk_size)
            velocity(network, cache, actions, time).sum().backward()

        counted("training the expert", base)
    chunk = found["pictures"] + found["language model"] + found["ten denoising steps"]
    found["a chunk"] = chunk
    found["base step"] = found["pictures"] + found["language model"] + found["training the expert"]
    found["delta step"] = found["language model"] + found["training the delta expert"]
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from kuavo_smolvla_ros.policy.delta_policy import BASE_CHUNKS, IMAGE_TOKENS, refine_rest

    delta = {"train_delta_expert": True, "delta_target": "demonstration", "delta_refine_steps": 1}
    policy = _policy(args, **delta, delta_max_age=8)
    plain = _policy(args)
    cls = _policy(args, **delta, use_cls_head=True)
    one, many = _batch(policy, 1, args.device), _batch(policy, args.batch, args.device)
    with torch.no_grad():
        tokens = policy.image_tokens(many)
    cached = {key: value for key, value in many.items() if "pixels" not in key}
    cached[IMAGE_TOKENS] = tokens
    cached[BASE_CHUNKS] = torch.zeros(args.batch, 1, 50, 32, device=args.device)

    def step(trained: Any, batch: Any) -> Callable[[], None]:
        trained.train()

        def run() -> None:
            trained.zero_grad(set_to_none=True)
            trained.forward(batch)[0].backward()

        return run

    jobs: dict[str, Callable[[], Any]] = {
        "chunk_s": lambda: plain.eval().predict_action_chunk(one, seed=0),
        "chunk_refined_s": lambda: policy.eval().predict_action_chunk(one, seed=0),
        "rest_refined_s": lambda: refine_rest(policy.eval(), one["observation.state"], 4),
        "base_step_s": step(plain, many),
        "delta_step_s": step(policy, cached),
        "delta_cls_step_s": step(cls, cached),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(args.rounds + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms
                times[name].append(time.perf_counter() - began)
    found: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    found["parameters"] = {
        "all": sum(p.numel() for p in policy.model.parameters()),
        "delta": sum(p.numel() for p in policy.model.delta_parameters().values()),
    }
    found["cheap_share"] = found["rest_refined_s"] / found["chunk_s"]
    found["step_share"] = found["delta_step_s"] / found["base_step_s"]
    return found


def _config(args: argparse.Namespace, **fields: Any) -> Any:
    from kuavo_smolvla_ros.policy.build import ensure_architecture
    from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig

    config = KuavoSmolVLAConfig(backbone=args.backbone, device=args.device, **fields)
    config.set_features(16, 16, dict.fromkeys(CAMERAS, (480, 640)))
    ensure_architecture(config)
    return config


def _policy(args: argparse.Namespace, **fields: Any) -> Any:
    import torch

    from kuavo_smolvla_ros.policy.dimensions import Statistics
    from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

    torch.manual_seed(0)
    config = _config(args, **fields)
    return KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths)).to(args.device)


def _batch(policy: Any, size: int, device: str) -> dict[str, Any]:
    import torch

    from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

    before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
    return before(
        {
            "observation.state": torch.zeros(size, 16),
            "action": torch.zeros(size, 50, 16),
            "action_is_pad": torch.zeros(size, 50, dtype=torch.bool),
            "task": [policy.config.instructions[0]] * size,
            **{f"observation.images.{name}": torch.rand(size, 3, 480, 640) for name in CAMERAS},
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    from kuavo_smolvla_ros.errors import UserError

    args = parse(argv)
    try:
        counts = count(args)
        found = {} if args.count_only else measure(args)
    except UserError as error:
        print(f"delta_cost: {error}", file=sys.stderr)
        return 2
    for name, value in counts.items():
        print(f"{name:<26} {value:9.1f} GFLOP")
    found["gflop"] = counts
    if args.count_only:
        found["cheap_share"] = counts["refining"] / counts["a chunk"]
        found["step_share"] = counts["delta step"] / counts["base step"]
    missed = []
    if found["cheap_share"] > CHEAP_SHARE:
        missed.append(
            f"refining the rest takes {found['cheap_share']:.2f} of a chunk, more than {CHEAP_SHARE}"
        )
    if found["step_share"] > STEP_SHARE:
        missed.append(f"a step takes {found['step_share']:.2f} of the base's, more than {STEP_SHARE}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**found, "missed": missed}, indent=2) + "\n")
    for name, value in found.items():
        if name.endswith("_s"):
            print(f"{name[:-2].replace('_', ' '):<18} {value * 1e3:9.1f} ms")
    how = "operations" if args.count_only else "time"
    print(
        f"delta cost ({args.backbone}): the rest refined in {found['cheap_share']:.3f} of a chunk's {how}, a "
        f"step in {found['step_share']:.2f} of the base's; {'; '.join(missed) or 'all targets met'}"
    )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
