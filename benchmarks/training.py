"""A training step of stock lerobot and of ours, in one run: same weights, same data, same optimizer.

Three pairs: the expert alone; the expert alone with vision features computed once; nine of twelve vision
layers trained (stock with the same layers frozen, which it cannot do by itself). Blocks of steps alternate.

python benchmarks/training.py                                     full size, 3 cameras
python benchmarks/training.py --only expert --batch-size 2        one pair
python benchmarks/training.py --backbone tiny --batch-size 4      seconds: that it runs, not how fast
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import extract_recipe, write_recipe
from kuavo_smolvla_ros.learning.feature_cache import open_cache
from kuavo_smolvla_ros.learning.feed import ListedBatches, make_loader
from kuavo_smolvla_ros.learning.heap import keep_freed_memory
from kuavo_smolvla_ros.learning.lerobot_source import open_task
from kuavo_smolvla_ros.learning.mixed_dataset import MixedDataset
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.stage import Initialisation, Stage, TaskData, Validation
from kuavo_smolvla_ros.learning.synthetic import synthetic_curriculum, synthetic_run
from kuavo_smolvla_ros.paths import config_dir
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.build import ensure_architecture
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.freezing import apply_plan
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.products import Linear
from kuavo_smolvla_ros.video_decoder import choose_video_backend

# name: (at least, or at most for shares; why)
TARGETS = {
    "expert": (1.2, "one pass for all cameras, fused attention, nothing recorded below the expert"),
    "cached": (7.0, "of 743 GFLOP per sample 638 are frozen vision: computed once instead of every epoch"),
    "nine": (1.3, "the same, with the backward pass of nine vision layers in both"),
}
SAVED_SHARE = (
    0.25,
    "stock keeps what its frozen language model computes for a backward pass that never comes",
)
DATA_SHARE = (0.05, "a device that waits for pictures is a device unused")
PAIRS = {"expert": "stock expert", "cached": "stock expert", "nine": "stock nine"}
CHUNK = 50
SENTENCE = "Pick up the moving object from the conveyor belt and place it on the table"
Step = Callable[[Any], Tensor]


@dataclass
class Loop:
    """One way to train: where batches come from, what happens to them, and one step."""

    batches: Callable[[], Iterator[Any]]
    preprocess: Callable[[Any], Any]
    policy: nn.Module
    loss: Callable[[Any], Tensor]
    fused_optimizer: bool | None = True
    samples_per_s: list[float] = field(default_factory=list)
    parts: list[tuple[float, float, float]] = field(default_factory=list)  # data, preprocess, update in s
    flops: float = 0.0
    saved_bytes: int = 0


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.accelerator = Accelerator(
            cpu=args.device == "cpu", mixed_precision="bf16" if args.device == "cuda" else "no"
        )
        self.data = make_data(folder / "data", args)
        self.run = synthetic_run(
            folder, batch_size=args.batch_size, num_workers=args.workers, min_free_gib=0.0, device=args.device
        )

    def stage(self, **policy: Any) -> Stage:
        task = TaskData(1, "task1", "a benchmark", SENTENCE, (str(self.data),), 0.34)
        first = synthetic_curriculum()[0]
        fields = {"backbone": self.args.backbone, "chunk_size": CHUNK, "tokenizer_max_length": 48, **policy}
        return Stage(
            name="benchmark",
            tasks=(task,),
            shares=(Fraction(1),),
            init=Initialisation("scratch"),
            optimizer=first.optimizer,
            schedule=first.schedule,
            training=first.training,
            validation=Validation(1, 1, 1, 0),
            thresholds=first.thresholds,
            policy=tuple(sorted(fields.items())),
        )

    def pair(self, **policy: Any) -> tuple[Loop, Loop, Loop | None]:
        """Stock's loop, ours, and ours with features where the tower is frozen."""
        stage = self.stage(**policy)
        backend = choose_video_backend()
        source = open_task(stage.task, CHUNK, video_backend=backend)
        manager = ReplayDatasetManager(stage, {"task1": source})
        config = stage.policy_config(device=self.args.device)
        config.set_features(16, 16, dict(manager.facts.cameras))
        statistics = Statistics.from_dataset(source.stats, source.facts.widths, config.std_floor)
        side = ensure_architecture(config).vision.image_size
        stock = self.stock_policy(config, side)
        weights = {name.removeprefix("model."): w for name, w in stock.state_dict().items()}
        ours = KuavoSmolVLAPolicy(config, weights=weights, statistics=statistics).to(self.args.device)
        apply_plan(stock.model, ours.freezing)
        pre, _ = make_kuavo_smolvla_pre_post_processors(config, statistics=statistics)
        samples = MixedDataset.of_manager(manager)

        def batches(data: MixedDataset) -> Callable[[], Iterator[Any]]:
            frames, size = manager.training_frames[0].tolist(), self.args.batch_size
            listed = [
                [Draw(0, frames[(i * size + j) % len(frames)], 0) for j in range(size)] for i in range(64)
            ]
            device = self.accelerator.device
            return lambda: iter(make_loader(data, ListedBatches(listed), self.run, device))

        def loss(batch: Any) -> Tensor:
            return ours(batch, None, None, "none")[0].mean()

        plain = Loop(batches(samples), pre, ours, loss)
        cached = None
        if config.train_expert_only:
            begin = time.perf_counter()
            features = open_cache(ours, manager, samples, pre, self.run, self.accelerator, print)
            print(f"filled in {time.perf_counter() - begin:.1f} s")
            cached = Loop(batches(features), pre, ours, loss)
            self.compare(plain, cached, ours)
        return self.stock_loop(stock, source.stats, backend), plain, cached

    def stock_policy(self, config: KuavoSmolVLAConfig, side: int) -> SmolVLAPolicy:
        torch.manual_seed(0)
        return SmolVLAPolicy(
            SmolVLAConfig(
                vlm_model_name=str(resolve_backbone(config.backbone, weights=False).path),
                resize_imgs_with_padding=(side, side),
                device=self.args.device,
                input_features=config.input_features,
                output_features=config.output_features,
                freeze_vision_encoder=config.train_expert_only,
                train_expert_only=config.train_expert_only,
            )
        ).float()

    def stock_loop(self, stock: SmolVLAPolicy, stats: Any, backend: str) -> Loop:
        meta = LeRobotDatasetMetadata(self.data.name, root=self.data)
        deltas = {"action": [step / meta.fps for step in range(CHUNK)]}
        dataset = LeRobotDataset(
            self.data.name, root=self.data, delta_timestamps=deltas, video_backend=backend
        )
        pre, _ = make_smolvla_pre_post_processors(stock.config, stats)

        def batches() -> Iterator[Any]:
            while True:
                yield from torch.utils.data.DataLoader(
                    dataset,
                    batch_size=self.args.batch_size,
                    num_workers=self.args.workers,
                    prefetch_factor=2 if self.args.workers else None,
                    pin_memory=self.args.device == "cuda",
                    drop_last=True,
                )

        return Loop(batches, pre, stock, lambda batch: stock.forward(batch)[0], fused_optimizer=None)

    def compare(self, plain: Loop, cached: Loop, policy: KuavoSmolVLAPolicy) -> None:
        """The same batch from pictures and from features, with the same noise."""
        size = self.args.batch_size
        noise = torch.randn(size, CHUNK, policy.config.max_action_dim, device=self.args.device)
        times = torch.linspace(0.1, 0.9, size, device=self.args.device)
        losses = []
        with torch.no_grad(), self.accelerator.autocast():
            for loop in (plain, cached):
                batch = loop.preprocess(next(loop.batches()))
                losses.append(policy(batch, noise, times)[0].item())
        print(f"loss from pictures {losses[0]:.7f}, from features {losses[1]:.7f}")

    def block(self, loop: Loop, steps: int) -> None:
        """One step that is not timed, then `steps` that are; the optimizer lives as long as the block."""
        trained = [p for p in loop.policy.parameters() if p.requires_grad]
        # lerobot takes torch's default; ours is one pass over parameters and moments.
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=loop.fused_optimizer)
        batches = loop.batches()
        loop.policy.train()
        for number in range(-1, steps):
            begin = time.perf_counter()
            raw = next(batches)
            loaded = time.perf_counter()
            batch = loop.preprocess(raw)
            prepared = self.now()
            counted = number < 0 and not loop.flops
            with measured(loop, trained) if counted else nullcontext():
                with self.accelerator.autocast():
                    loss = loop.loss(batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            end = self.now()
            if number >= 0:
                loop.samples_per_s.append(self.args.batch_size / (end - begin))
                loop.parts.append((loaded - begin, prepared - loaded, end - prepared))
        del optimizer, batches
        for parameter in trained:
            parameter.grad = None
        gc.collect()

    def now(self) -> float:
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_flops(self) -> float:
        """What this machine's matrix product reaches at best, torch's own or oneDNN's, in FLOP/s."""
        cuda = self.args.device == "cuda"
        size = 8192 if cuda else 2048
        a = torch.randn(size, size, device=self.args.device, dtype=torch.bfloat16 if cuda else torch.float32)
        linear = Linear(size, size, bias=False, device=self.args.device).to(a.dtype)
        medians = []
        for product in (lambda: a @ a, lambda: linear(a)):
            times = []
            for _ in range(7):
                begin = self.now()
                with torch.no_grad():
                    product()
                times.append(self.now() - begin)
            medians.append(statistics.median(times[2:]))
        return 2 * size**3 / min(medians)


class measured(AbstractContextManager[None]):  # noqa: N801
    """Counts a step's operations, and what its forward pass keeps for the backward pass beside parameters."""

    def __init__(self, loop: Loop, trained: list[nn.Parameter]) -> None:
        self.loop = loop
        self.counter = FlopCounterMode(display=False)
        own = {p.untyped_storage().data_ptr() for p in loop.policy.parameters()}
        self.kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self.kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def __enter__(self) -> None:
        self.counter.__enter__()
        self.hooks.__enter__()

    def __exit__(self, *fault: Any) -> None:
        self.hooks.__exit__(*fault)
        self.counter.__exit__(*fault)
        self.loop.flops = float(self.counter.get_total_flops())
        self.loop.saved_bytes = sum(self.kept.values())


def make_data(folder: Path, args: argparse.Namespace) -> Path:
    """Three short episodes of three cameras, converted as recordings are (AV1)."""
    spec = "kuavo_sim"
    if args.backbone == "tiny":
        streams = {"head_cam_h": "head_image", "wrist_cam_l": "left_image", "wrist_cam_r": "right_image"}
        lines = [f"extends: {config_dir()}/robot/kuavo_sim.yaml", "cameras:"]
        lines += [f"  {camera}: {{stream: {s}, height: 64, width: 96}}" for camera, s in streams.items()]
        folder.mkdir(parents=True)
        (folder / "small.yaml").write_text("\n".join(lines) + "\n")
        spec = str(folder / "small.yaml")
    bags = folder / "bags"
    write_recipe(
        bags / "a.bag",
        *({"length": args.frames, "seed": e, "task": "task1", "instruction": SENTENCE} for e in range(3)),
    )
    convert(find_recordings([bags]), folder / "task1", ConversionSettings(spec), extract_recipe)
    return folder / "task1"


def row(loop: Loop, peak: float) -> dict[str, float]:
    data, pre, update = (statistics.median(part) for part in zip(*loop.parts, strict=True))
    rate = statistics.median(loop.samples_per_s)
    return {
        "samples_per_s": rate,
        "data_s": data,
        "preprocess_s": pre,
        "update_s": update,
        "data_share": data / (data + pre + update),
        "gflop_per_step": loop.flops / 1e9,
        "saved_gib": loop.saved_bytes / 2**30,
        "mfu": loop.flops / (data + pre + update) / peak,
    }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if args.device == "cpu":
        keep_freed_memory()  # for stock as well, which by itself does not
    bench = Bench(args, folder)
    peak = bench.peak_flops()
    rows: dict[str, dict[str, float]] = {}
    layers = {"expert": {"train_expert_only": True}}
    if args.backbone == "tiny":
        layers["nine"] = {"train_expert_only": False, "unfreeze_vision_layers": (-1, -2, -3)}
    else:
        layers["nine"] = {"train_expert_only": False, "unfreeze_vision_layers": tuple(range(-9, 0))}
    for name, policy in layers.items():
        if args.only not in (None, name):
            continue
        stock, ours, cached = bench.pair(**policy)
        loops = {f"stock {name}": stock, name: ours, **({"cached": cached} if cached else {})}
        for _ in range(args.rounds):
            for each in loops.values():
                bench.block(each, args.steps)
        rows |= {key: row(loop, peak) for key, loop in loops.items()}
        del stock, ours, cached, loops
        gc.collect()
    return {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "backbone": args.backbone,
        "batch_size": args.batch_size,
        "peak_gflops": peak / 1e9,
        "rows": rows,
        "ratios": {
            name: rows[name]["samples_per_s"] / rows[against]["samples_per_s"]
            for name, against in PAIRS.items()
            if name in rows and against in rows
        },
    }


def shortfalls(figures: dict[str, Any]) -> list[str]:
    """What misses its target, in words."""
    short = [
        f"{name} {ratio:.2f}x < {TARGETS[name][0]:g}x"
        for name, ratio in figures["ratios"].items()
        if ratio < TARGETS[name][0]
    ]
    rows = figures["rows"]
    if "expert" in rows:
        share = rows["expert"]["saved_gib"] / rows["stock expert"]["saved_gib"]
        if share > SAVED_SHARE[0]:
            short.append(f"saved activations {share:.2f} > {SAVED_SHARE[0]:g} of stock's")
    return short + [
        f"{name} waits for data {entry['data_share']:.0%} of the time"
        for name, entry in rows.items()
        if not name.startswith("stock") and entry["data_share"] > DATA_SHARE[0]
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/training.py --json outputs/training.json --check",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backbone", default="smolvlm2-500m", choices=("smolvlm2-500m", "tiny"))
    parser.add_argument("--only", choices=("expert", "nine"), help="this pair alone (expert: with cache too)")
    parser.add_argument("--batch-size", type=int, default=2, help="default 2")
    parser.add_argument("--steps", type=int, default=2, help="timed in each block (default 2)")
    parser.add_argument("--rounds", type=int, default=2, help="blocks of each kind (default 2)")
    parser.add_argument("--frames", type=int, default=8, help="of each of three episodes (default 8)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.steps, args.rounds, args.frames) < 1:
        parser.error("--batch-size, --steps, --rounds and --frames are at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, Path(folder))
    print(
        f"{'':<14}{'samples/s':>10}{'data s':>9}{'pre s':>9}{'update s':>10}{'GFLOP':>9}{'saved GiB':>11}"
        f"{'MFU':>7}   (peak {figures['peak_gflops']:.0f} GFLOP/s)"
    )
    for name, entry in figures["rows"].items():
        print(
            f"{name:<14}{entry['samples_per_s']:>10.3f}{entry['data_s']:>9.3f}{entry['preprocess_s']:>9.3f}"
            f"{entry['update_s']:>10.3f}{entry['gflop_per_step']:>9.0f}{entry['saved_gib']:>11.2f}"
            f"{entry['mfu']:>7.0%}"
        )
    figures["short"] = shortfalls(figures)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    ratios = ", ".join(f"{name} {ratio:.2f}x stock" for name, ratio in figures["ratios"].items())
    verdict = "short of target: " + "; ".join(figures["short"]) if figures["short"] else "all targets met"
    print(f"training: {ratios}; {verdict}")
    return 1 if args.check and figures["short"] else 0


if __name__ == "__main__":
    sys.exit(main())
