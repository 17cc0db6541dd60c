"""A chunk by stock lerobot and by this package: same weights, same noise, one process, runs in turn.

    python benchmarks/inference.py [--backbone smolvlm2-500m|tiny] [--device cpu|cuda] [--levers] [--check]

Both begin with the cameras' pictures; state and words are ready. Prints medians of whole chunks and of their
parts, the largest difference from stock, and the share of what the machine could do: operations and weights
are counted (`policy/sampler_cost.py`), the machine's rates are measured by products and a copy in the same
run. Weights are random. With --levers also what changes results; their errors with trained weights will be
larger.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors
from kuavo_smolvla_ros.policy.quantized import Int8Linear, why_not_int8
from kuavo_smolvla_ros.policy.sampler import Sampler, SamplerOptions
from kuavo_smolvla_ros.policy.sampler_cameras import CameraTokens
from kuavo_smolvla_ros.policy.sampler_cost import Cost, encode_cost, prefix_cost, step_cost
from kuavo_smolvla_ros.policy.sampler_linear import OneDnnLinear, why_not_onednn

SENTENCE = "Pick up the moving object from the conveyor belt"
ROLES = ("head_cam_h", "wrist_cam_l", "wrist_cam_r")
PICTURE = (480, 640)
PARTS = ("images", "vision", "prefix", "step")
# By which a normalised error becomes radians: the mean deviation of the arm joints over nine episodes of the
# simulator's experts (tasks 1 to 3).
JOINT_STD_RAD = 0.28


class Target(NamedTuple):
    variant: str
    least_ratio: float
    worst_error: float
    reason: str


TARGETS = {
    ("cpu", "smolvlm2-500m"): (
        Target("fast fp32", 1.0, 1e-5, "must not cost accuracy, nor time"),
        Target("fast bf16", 1.8, 0.05, "half the bits; rounding as in stock's own bfloat16"),
        Target("fast int8", 2.2, 0.2, "worth its error only if clearly faster"),
    ),
    ("cpu", "tiny"): (Target("fast fp32", 3.0, 1e-5, "all overhead: what the code itself costs"),),
    ("cuda", "smolvlm2-500m"): (
        Target("fast bf16", 12.0, 0.05, "13 000 launches become three graphs of about 2 000 kernels"),
    ),
}
LIMIT_CUDA_MS = 10.0
# What each rung of the ladder changes, and in which: the plot shows what that brought.
BUILDS_ON = {
    "plain fp32": "stock fp32",
    "fast fp32, torch products": "plain fp32",
    "fast fp32": "fast fp32, torch products",
    "fast fp32, torch attention": "fast fp32, torch products",
    "fast bf16": "fast fp32",
    "fast bf16, one new camera": "fast bf16",
    "fast bf16, all ahead": "fast bf16, one new camera",
    "fast int8": "fast bf16",
    "bf16, one camera off": "fast bf16",
    "bf16, 4 steps": "fast bf16",
    "bf16, 384 px": "fast bf16",
    "bf16, unpadded 4:3": "fast bf16",
    "int8, 4 steps, unpadded": "fast int8",
}
CHANGES_RESULTS = (
    "fast int8",
    "bf16, 4 steps",
    "bf16, 384 px",
    "bf16, unpadded 4:3",
    "int8, 4 steps, unpadded",
)


class Work(NamedTuple):
    """What a variant computes: how many pictures of which size (width, height) it encodes, and its steps."""

    encoded: int
    size: tuple[int, int]
    steps: int


@dataclass
class Variant:
    """A way to a chunk, and what its runs took."""

    name: str
    run: Callable[[], Tensor]
    timers: Timers
    precision: str
    work: Work
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    chunk: Tensor | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def part_ms(self, part: str) -> float | None:
        values = self.parts.get(part)
        return statistics.median(values) * 1e3 if values else None


class Timers:
    """Adds up the time spent in some methods of objects, replaced on the objects themselves."""

    def __init__(self, device: str, *places: tuple[str, Any, str]) -> None:
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.spent: dict[str, list[float]] = {}
        for part, owner, method in places:
            object.__setattr__(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self._wait()
            self.spent.setdefault(part, []).append(time.perf_counter() - started)
            return result

        return timed


def make_pair(args: argparse.Namespace) -> tuple[Any, KuavoSmolVLAPolicy]:
    """Stock lerobot with random weights in single precision, and ours on the same tensors."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = KuavoSmolVLAConfig(
        backbone=args.backbone, device=args.device, vision_position_ids="stock", pin_padding=False
    )
    config.set_features(16, 16, dict.fromkeys(ROLES[: args.cameras], PICTURE))
    side = 64 if args.backbone == "tiny" else 512
    stock = SmolVLAPolicy(
        SmolVLAConfig(
            vlm_model_name=str(resolve_backbone(args.backbone).path),
            resize_imgs_with_padding=(side, side),
            device=args.device,
            input_features=config.input_features,
            output_features=config.output_features,
        )
    )
    stock = stock.float().eval().to(args.device)
    weights = {name.removeprefix("model."): w for name, w in stock.state_dict().items()}
    ours = KuavoSmolVLAPolicy(config, weights=weights, statistics=Statistics.identity(config.widths))
    return stock, ours.to(args.device).eval()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stock, self.ours = make_pair(args)
        random = torch.Generator().manual_seed(1)
        cameras = self.ours.config.cameras
        self.pictures = {
            name: torch.randint(0, 256, (*PICTURE, 3), dtype=torch.uint8, generator=random)
            for name in cameras
        }
        before, _ = make_kuavo_smolvla_pre_post_processors(self.ours.config, statistics=self.ours.statistics)
        raw = {"observation.state": torch.randn(16, generator=random), "task": SENTENCE}
        images = {f"observation.images.{name}": p for name, p in self.pictures.items()}
        batch = before({**raw, **images})
        language = {name: value for name, value in batch.items() if "language" in name}
        self.batch = {"observation.state": batch["observation.state"], **language}
        self.arrays = {name: p.numpy() for name, p in images.items()}
        self.noise = torch.randn(1, 50, 32, generator=random).to(args.device)
        self.words = int(batch["observation.language.attention_mask"].sum())
        self.variants: list[Variant] = []
        self.rates: dict[str, float] = {}
        self._samplers: dict[SamplerOptions, Sampler] = {}

    def add_stock(self) -> None:
        model = self.stock.model
        from lerobot.utils import control_utils

        def run() -> Tensor:
            # As lerobot's own control loop begins: pictures as the cameras give them.
            images = control_utils.prepare_observation_for_inference(
                dict(self.arrays), torch.device(self.args.device)
            )
            return self.stock.predict_action_chunk({**images, **self.batch}, self.noise)

        timers = Timers(
            self.args.device,
            ("images", control_utils, "prepare_observation_for_inference"),
            ("images", self.stock, "prepare_images"),
            ("vision", model.vlm_with_expert, "embed_image"),
            ("step", model, "denoise_step"),
        )
        self._add("stock fp32", run, timers, "float32", self._work(SamplerOptions()))

    def add_plain(self) -> None:
        images = {f"observation.images.{n}": p[None].to(self.args.device) for n, p in self.pictures.items()}
        batch = {**self.batch, **images}
        run = partial(self.ours.predict_action_chunk, batch, self.noise)
        timers = Timers(self.args.device)
        self._add("plain fp32", run, timers, "float32", self._work(SamplerOptions()))

    def add_fast(self, name: str, options: SamplerOptions, *, ahead: int = 0, attention: bool = True) -> None:
        """`ahead` cameras have been encoded before; without `attention` the vision encoder's is torch's."""
        pictures = self.pictures
        sampler = self._sampler(options)
        tokens = CameraTokens(sampler, list(pictures), self.ours.config.image_size)
        known = dict.fromkeys(list(pictures)[:ahead], 0)
        for camera in known:
            tokens.put(camera, pictures[camera], 0)
        usual = sampler._steps.onednn

        def run() -> Tensor:
            sampler._steps.onednn = usual and attention
            return sampler.chunk(self.batch, self.noise, image_tokens=tokens.tokens(pictures, known))

        places = [("vision", sampler, "encode"), ("tokens", tokens, "tokens")]
        if self.args.device == "cpu":  # on a GPU both are replayed from graphs
            places += [("prefix", sampler, "_run_prefix"), ("step", sampler._steps, "velocity")]
        precision = "int8" if options.dtype == "int8" else str(sampler.dtype).removeprefix("torch.")
        self._add(name, run, Timers(self.args.device, *places), precision, self._work(options, ahead))

    def _work(self, options: SamplerOptions, ahead: int = 0) -> Work:
        config = self.ours.config
        width, height = options.image_size or config.image_size
        if options.unpadded:
            height = width * PICTURE[0] // PICTURE[1]
        steps = options.steps or config.num_steps
        return Work(self.args.cameras - ahead, (width, height), steps)

    def _sampler(self, options: SamplerOptions) -> Sampler:
        """Pictures' sizes are no part of the packed weights: samplers that differ in them share those."""
        base = replace(options, image_size=None, unpadded=False)
        if base not in self._samplers:
            self._samplers[base] = Sampler(self.ours, base)
        if options == base:
            return self._samplers[base]
        sampler = copy.copy(self._samplers[base])
        sampler.options = options
        return sampler

    def _add(self, name: str, run: Callable[[], Tensor], timers: Timers, precision: str, work: Work) -> None:
        self.variants.append(Variant(name, run, timers, precision, work))

    def measure(self) -> None:
        """Once to warm up, then all in turn: what disturbs the machine disturbs all of them."""
        wait = torch.cuda.synchronize if self.args.device == "cuda" else lambda: None
        turns, begun = self.args.repeats + 1, time.monotonic()
        for turn in range(turns):
            if turn > 1 and time.monotonic() - begun > self.args.seconds:
                break
            for name, rate in machine_rates(self.args.device).items() if turn < 4 else ():
                self.rates[name] = max(rate, self.rates.get(name, 0.0))
            for variant in self.variants:
                print(f"\r{turn + 1}/{turns} {variant.name:<30}", end="", file=sys.stderr, flush=True)
                variant.timers.spent.clear()
                wait()
                started = time.perf_counter()
                variant.chunk = variant.run()
                wait()
                total = time.perf_counter() - started
                if turn == 0:
                    continue
                variant.seconds.append(total)
                for part, seconds in _parts(variant.timers.spent, total).items():
                    variant.parts.setdefault(part, []).append(seconds)

    def cost(self, work: Work) -> dict[str, Cost]:
        """Of vision, the prefix and one step."""
        sizes, config = self.ours.model.architecture, self.ours.config
        width, height = work.size
        encoded = encode_cost(sizes, height, width) if work.encoded else Cost(0, 0)
        length = self.args.cameras * sizes.image_tokens(height, width) + self.words + 1
        return {
            # Together the cameras read the weights once.
            "vision": encoded._replace(flops=encoded.flops * work.encoded),
            "prefix": prefix_cost(sizes, length),
            "step": step_cost(sizes, length, config.chunk_size, config.max_action_dim),
        }


def _parts(spent: Mapping[str, list[float]], total: float) -> dict[str, float]:
    """Images, vision, prefix and one step from what the timers saw; vision is inside the cameras' tokens."""
    parts = {}
    vision = sum(spent.get("vision", []))
    if "images" in spent:
        parts["images"] = sum(spent["images"])
    elif "tokens" in spent:
        parts["images"] = sum(spent["tokens"]) - vision
    if "vision" in spent:
        parts["vision"] = vision
    steps = spent.get("step", [])
    if steps:
        parts["step"] = statistics.median(steps)
        rest = total - sum(steps) - vision - parts.get("images", 0.0)
        parts["prefix"] = sum(spent["prefix"]) if "prefix" in spent else rest
    return parts


def machine_rates(device: str) -> dict[str, float]:
    """Operations per second of each precision and bytes per second, the best of a few runs; asked for before
    each turn, because a busy machine shows its best only now and then.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def best(run: Callable[[], object], work: float) -> float:
        times = []
        for _ in range(5):
            wait()
            started = time.perf_counter()
            run()
            wait()
            times.append(time.perf_counter() - started)
        return work / min(times)

    side = 8192 if device == "cuda" else 2048
    rates = {}
    x = torch.randn(side, side, device=device)
    if device == "cpu" and why_not_onednn(torch.float32) is None:
        packed = OneDnnLinear(x, None, side)
        rates["float32"] = max(best(lambda: packed(x), 2 * side**3), best(lambda: x @ x, 2 * side**3))
        rates["torch's own float32"] = best(lambda: x @ x, 2 * side**3)
    else:
        rates["float32"] = best(lambda: x @ x, 2 * side**3)
    half = x.bfloat16()
    rates["bfloat16"] = best(lambda: half @ half, 2 * side**3)
    if device == "cpu" and why_not_int8() is None:
        eight = Int8Linear(x, None, side)
        rates["int8"] = best(lambda: eight(half), 2 * side**3)
    big = torch.ones(2**26 if device == "cpu" else 2**30, device=device)
    rates["bytes"] = best(big.sum, big.numel() * 4)
    return rates


ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def roofline_s(cost: Cost, precision: str, rates: Mapping[str, float]) -> float:
    """Seconds in which nothing could do this on this machine faster."""
    return max(cost.flops / rates[precision], cost.weights * ITEM_BYTES[precision] / rates["bytes"])


def report(bench: Bench) -> list[dict[str, Any]]:
    stock, rates = bench.variants[0], bench.rates
    units = {name: "B/s" if name == "bytes" else "FLOP/s" for name in rates}
    print(
        "\rmachine: " + ", ".join(f"{name} {rate / 1e9:.0f} G{units[name]}" for name, rate in rates.items())
    )
    costs = bench.cost(stock.work)
    print("counted: " + ", ".join(f"{part} {c.flops / 1e9:.1f} GFLOP" for part, c in costs.items()))
    print(
        f"{'':<26}{'chunk ms':>9}{'ratio':>7}{'images':>8}{'vision':>8}{'prefix':>8}{'step':>7}"
        f"{'roofline':>9}  max |difference|"
    )
    rows = []
    for variant in bench.variants:
        least = sum(
            roofline_s(cost, variant.precision, rates) * (variant.work.steps if part == "step" else 1)
            for part, cost in bench.cost(variant.work).items()
        )
        assert variant.chunk is not None
        assert stock.chunk is not None
        error = (variant.chunk.float() - stock.chunk.float()).abs().max().item()
        row = {
            "name": variant.name,
            "precision": variant.precision,
            "ms": variant.median_s * 1e3,
            "ratio": stock.median_s / variant.median_s,
            **{part: variant.part_ms(part) for part in PARTS},
            "roofline_share": least / variant.median_s,
            "error": error,
            "error_rms": (variant.chunk.float() - stock.chunk.float()).square().mean().sqrt().item(),
            "error_rad": error * JOINT_STD_RAD,
            "runs_ms": [round(s * 1e3, 2) for s in variant.seconds],
        }
        rows.append(row)
        widths = dict(zip(PARTS, (8, 8, 8, 7), strict=True))
        cells = "".join(f"{'-':>{w}}" if row[p] is None else f"{row[p]:>{w}.1f}" for p, w in widths.items())
        print(
            f"{variant.name:<26}{row['ms']:>9.1f}{row['ratio']:>6.2f}x{cells}{row['roofline_share']:>9.0%}"
            f"  {error:.1e}",
            flush=True,
        )
    return rows


def add_variants(bench: Bench, args: argparse.Namespace) -> None:
    """The ladder: each adds one thing to the one before; then, if asked for, what changes results."""
    bench.add_stock()
    bench.add_plain()
    if args.dtype in ("all", "float32"):
        if args.device == "cpu" and args.backbone != "tiny":
            bench.add_fast("fast fp32, torch products", SamplerOptions(dtype="float32", forms="dense"))
            if torch.get_num_threads() == 1:  # with more, the fast path's attention is torch's as well
                options = SamplerOptions(dtype="float32")
                bench.add_fast("fast fp32, torch attention", options, attention=False)
        bench.add_fast("fast fp32", SamplerOptions(dtype="float32"))
    half = SamplerOptions(dtype="bfloat16")
    if args.dtype in ("all", "bfloat16"):
        bench.add_fast("fast bf16", half)
        if args.cameras > 1:
            bench.add_fast("fast bf16, one new camera", half, ahead=args.cameras - 1)
        bench.add_fast("fast bf16, all ahead", half, ahead=args.cameras)
    if args.device == "cpu" and (args.dtype == "int8" or args.dtype == "all"):
        bench.add_fast("fast int8", SamplerOptions(dtype="int8"))
    if args.levers:
        bench.add_fast("bf16, 4 steps", replace(half, steps=4))
        if args.cameras > 1:  # a picture that stays the same is kept, whether by its stamp or by its contents
            bench.add_fast("bf16, one camera off", half, ahead=1)
        if args.backbone != "tiny":
            bench.add_fast("bf16, 384 px", replace(half, image_size=(384, 384)))
            bench.add_fast("bf16, unpadded 4:3", replace(half, unpadded=True))
            if args.device == "cpu":
                eight = SamplerOptions(dtype="int8", steps=4, unpadded=True)
                bench.add_fast("int8, 4 steps, unpadded", eight)


def shortfalls(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    by_name = {row["name"]: row for row in rows}
    short = []
    for target in TARGETS.get((args.device, args.backbone), ()):
        row = by_name.get(target.variant)
        if row is None:
            continue
        if row["ratio"] < target.least_ratio:
            short.append(
                f"{target.variant} is {row['ratio']:.2f}x stock, not {target.least_ratio:g}x "
                f"({target.reason})"
            )
        if not row["error"] < target.worst_error:
            short.append(f"{target.variant} is off by {row['error']:.1e}, not below {target.worst_error:g}")
    if args.device == "cuda" and args.backbone != "tiny" and "fast bf16" in by_name:
        took = by_name["fast bf16"]["ms"]
        if took > LIMIT_CUDA_MS:
            short.append(f"fast bf16 takes {took:.1f} ms, not {LIMIT_CUDA_MS:g} ms")
    ahead, all_new = by_name.get("fast bf16, one new camera"), by_name.get("fast bf16")
    if (
        args.backbone != "tiny"
        and ahead
        and all_new
        and ahead["vision"]
        and ahead["vision"] > all_new["vision"] / 2
    ):
        short.append("one new camera costs more than half of what three cost: nothing was encoded ahead")
    return short


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """The ladder as bars, each with what it brought against the rung it stands on."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    took = {row["name"]: row["ms"] for row in rows}

    def told(row: dict[str, Any]) -> str:
        base = BUILDS_ON.get(row["name"])
        brought = "" if base not in took else f"   {row['ms'] - took[base]:+.0f} against {base}"
        return f"{row['ms']:.0f} ms, {row['ratio']:.2f}x{brought}"

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "inference", "font.size": 9}):
        figure = Figure((8.5, 0.34 * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([row["name"] for row in rows], [row["ms"] for row in rows], color="#1f6fb4")
        bars[0].set_color("0.6")
        for bar, row in zip(bars, rows, strict=True):
            if row["name"] in CHANGES_RESULTS:
                bar.set_color("#d1701c")
        axes.bar_label(bars, [told(row) for row in rows], padding=3)
        axes.invert_yaxis()
        axes.set(
            xlabel="ms per chunk (orange: changes results)",
            title=title,
            xlim=(0, max(row["ms"] for row in rows) * 1.6),
        )
        axes.spines[["top", "right"]].set_visible(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/inference.py --backbone tiny --json outputs/speed.json --check",
    )
    parser.add_argument("--backbone", choices=("smolvlm2-500m", "tiny"), default="smolvlm2-500m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cameras", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--dtype", choices=("all", "float32", "bfloat16", "int8"), default="all")
    parser.add_argument("--levers", action="store_true", help="also what changes results")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn (default 5)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="begin no further turn after so long (default 120)"
    )
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ladder (.svg or .png)")
    parser.add_argument(
        "--redraw", type=Path, metavar="FILE", help="measure nothing: --plot the figures of an earlier --json"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    args = parser.parse_args()
    if args.redraw is not None and args.plot is None:
        parser.error("--redraw needs --plot FILE")
    if args.repeats < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--repeats and --threads must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device")
    return args


def main() -> int:
    args = parse_arguments()
    if args.redraw is not None:
        before = json.loads(args.redraw.read_text())
        draw(before["rows"], before["title"], args.plot)
        return 0
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    add_variants(bench, args)
    bench.measure()
    rows = report(bench)
    short = shortfalls(rows, args)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    threads = torch.get_num_threads()
    title = f"{args.backbone}, {args.cameras} cameras, {args.device}, {threads} threads"
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "title": title,
            "machine": machine,
            "threads": threads,
            "runs": len(bench.variants[0].seconds),
            "torch": torch.__version__,
            "rates": bench.rates,
            "cost": {part: cost._asdict() for part, cost in bench.cost(bench.variants[0].work).items()},
            "rows": rows,
            "short": short,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.plot is not None:
        draw(rows, title, args.plot)
    verdict = "short of target: " + "; ".join(short) if short else "all targets met"
    print(f"inference ({title}, {len(bench.variants[0].seconds)} runs each): {verdict}")
    return 1 if args.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
