"""What one message costs: decoding a 640x480 picture, and keeping a robot's streams in order of time.

    python benchmarks/messages.py [--json FILE] [--check]

Each figure is the median of calls that take turns with what it is compared to, on one core.
"""

from __future__ import annotations

import argparse
import array
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np

from kuavo_smolvla_ros.robot.grid import Recorded, sample_grid, uniform_grid
from kuavo_smolvla_ros.robot.images import decode_image, encode_jpeg, image_digest
from kuavo_smolvla_ros.robot.timeline import Budget, Observation, Timeline

MS = 1_000_000
SECOND = 1_000 * MS
HEIGHT, WIDTH = 480, 640
SKEW = 50 * MS
RATES_HZ = {"head": 30, "left": 30, "right": 30, "arms": 500, "grippers": 500}
BUDGETS = {
    name: Budget(250 * MS, max_frozen_ns=500 * MS) if rate == 30 else Budget(100 * MS)
    for name, rate in RATES_HZ.items()
}


class Target(NamedTuple):
    figure: str
    limit: float
    at_least: bool
    reason: str

    def missed_by(self, value: float) -> bool:
        return value < self.limit if self.at_least else value > self.limit


TARGETS = (
    Target("raw_rgb8_ms", 1.0, False, "three raw cameras at 30 Hz must take less than a tenth of a core"),
    Target("raw_bgr8_ms", 1.0, False, "as rgb8, with red and blue exchanged"),
    Target("jpeg_ms", 6.0, False, "three pictures are decoded per inference, one of which comes every 0.8 s"),
    Target("jpeg_check_ms", 0.3, False, "refusing truncated files must not be felt beside decoding them"),
    Target(
        "raw_digest_ms", 1.0, False, "three raw cameras at 30 Hz are watched for less than a tenth of a core"
    ),
    Target("jpeg_digest_ms", 0.1, False, "the same for compressed pictures"),
    Target("latest_us", 50.0, False, "asked at up to 100 Hz, that is half a percent of a core"),
    Target("timeline_core_percent", 2.0, False, "keeping time must leave the node's core to its work"),
    Target(
        "grid_speedup", 20.0, True, "the vectorised path is there to make conversion faster, or it can go"
    ),
)


def medians_ms(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each call, all taking turns, so that a busy moment hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def camera_picture() -> np.ndarray:
    """Edges, gradients and sensor noise: about as hard to compress as a table top with boxes."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    picture = np.dstack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256]).astype(np.int16)
    for _ in range(40):
        top, left = rng.integers(0, HEIGHT - 60), rng.integers(0, WIDTH - 80)
        picture[top : top + 60, left : left + 80] = rng.integers(0, 256, 3)
    picture += rng.normal(0, 4, picture.shape).astype(np.int16)
    return picture.clip(0, 255).astype(np.uint8)


def raw_message(encoding: str, pixels: np.ndarray) -> SimpleNamespace:
    data = array.array("B", pixels.tobytes())  # what rclpy hands over
    return SimpleNamespace(height=HEIGHT, width=WIDTH, encoding=encoding, step=pixels[0].size, data=data)


def measure_images(rounds: int) -> dict[str, float]:
    rgb = camera_picture()
    raw = {name: raw_message(name, rgb) for name in ("rgb8", "bgr8")}
    raw["mono8"] = raw_message("mono8", rgb[..., 0])
    raw["bayer_rggb8"] = raw_message("bayer_rggb8", rgb[..., 0])
    jpeg = SimpleNamespace(format="jpeg", data=array.array("B", encode_jpeg(rgb, 90)))
    png = SimpleNamespace(format="png", data=array.array("B", bytes(cv2.imencode(".png", rgb[..., ::-1])[1])))

    def bare_jpeg() -> np.ndarray:
        return cv2.cvtColor(
            cv2.imdecode(np.frombuffer(jpeg.data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )

    calls: dict[str, Callable[[], object]] = {
        f"raw_{name}_ms": lambda message=message: decode_image(message) for name, message in raw.items()
    }
    calls |= {
        "jpeg_ms": lambda: decode_image(jpeg),
        "jpeg_bare_opencv_ms": bare_jpeg,
        "raw_digest_ms": lambda: image_digest(raw["rgb8"]),
        "jpeg_digest_ms": lambda: image_digest(jpeg),
    }
    figures = medians_ms(calls, rounds)
    slow: dict[str, Callable[[], object]] = {
        "png_ms": lambda: decode_image(png),
        "raw_rgb8_through_a_list_ms": lambda: np.array(list(raw["rgb8"].data), np.uint8),
    }
    figures |= medians_ms(slow, max(rounds // 20, 3))
    figures["jpeg_check_ms"] = max(figures["jpeg_ms"] - figures["jpeg_bare_opencv_ms"], 0.0)
    figures["jpeg_kilobytes"] = len(jpeg.data) / 1e3
    return figures


def traffic(seconds: int) -> list[tuple[int, str, int]]:
    """(stamp, stream, digest) of every message, in order of time."""
    return sorted(
        (SECOND + offset * MS + i * SECOND // rate, name, i)
        for offset, (name, rate) in enumerate(RATES_HZ.items())
        for i in range(seconds * rate)
    )


def run_live(messages: list[tuple[int, str, int]], grid: list[int]) -> int:
    """Push everything, asking at each grid time; how often there was an observation."""
    live: Timeline[int] = Timeline(BUDGETS, SKEW)
    ticks = iter([*grid, 1 << 62])
    tick, seen = next(ticks), 0
    for stamp, name, digest in messages:
        while stamp > tick:
            seen += isinstance(live.observe(tick), Observation)
            tick = next(ticks)
        live.push(name, stamp, digest, digest, now_ns=stamp)
    while tick != 1 << 62:
        seen += isinstance(live.observe(tick), Observation)
        tick = next(ticks)
    return seen


def measure_timeline(rounds: int, seconds: int = 10) -> dict[str, float]:
    messages = traffic(seconds)
    end = messages[-1][0]
    grid = uniform_grid(SECOND + 50 * MS, end, 10)
    recorded = {
        name: Recorded(
            np.array([m[0] for m in messages if m[1] == name], dtype=np.int64),
            np.array([m[2] for m in messages if m[1] == name], dtype=np.int64),
        )
        for name in RATES_HZ
    }
    live: Timeline[int] = Timeline(BUDGETS, SKEW)
    for stamp, name, digest in messages:
        live.push(name, stamp, digest, digest, now_ns=stamp)
    if run_live(messages, grid.tolist()) != sample_grid(recorded, BUDGETS, SKEW, grid).usable.sum():
        raise AssertionError("live and recorded do not agree, so there is nothing to compare")
    figures = medians_ms(
        {
            "live": lambda: run_live(messages, grid.tolist()),
            "grid": lambda: sample_grid(recorded, BUDGETS, SKEW, grid),
        },
        max(rounds // 20, 5),
    )
    latest = medians_ms({"latest": lambda: live.latest(end)}, rounds * 5)["latest"]
    return {
        "push_us": figures["live"] * 1e3 / len(messages),
        "latest_us": latest * 1e3,
        "timeline_core_percent": figures["live"] / (seconds * 1e3) * 100,
        "grid_of_10_s_ms": figures["grid"],
        "grid_speedup": figures["live"] / figures["grid"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    parser.add_argument("--rounds", type=int, default=200, help="calls per figure (default 200)")
    args = parser.parse_args()

    cv2.setNumThreads(1)
    figures = measure_images(args.rounds) | measure_timeline(args.rounds)
    for name, value in figures.items():
        print(f"{name:28s} {value:10.3f}")
    missed = [target for target in TARGETS if target.missed_by(figures[target.figure])]
    for target in missed:
        wanted = f"{'at least' if target.at_least else 'at most'} {target.limit}"
        print(f"missed: {target.figure} {figures[target.figure]:.3f}, wanted {wanted}: {target.reason}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"figures": figures, "missed": [target.figure for target in missed]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"640x480: jpeg {figures['jpeg_ms']:.2f} ms, raw rgb8 {figures['raw_rgb8_ms']:.3f} ms; "
        f"3 x 30 Hz + 2 x 500 Hz in order of time: {figures['timeline_core_percent']:.2f} % of a core, "
        f"latest() {figures['latest_us']:.1f} us; {len(TARGETS) - len(missed)} of {len(TARGETS)} targets met"
    )
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
