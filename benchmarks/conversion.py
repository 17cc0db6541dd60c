"""How fast recordings become a dataset, and how fast the dataset is read, beside LeRobot's own ways.

Both sides get the same decoded pictures from the same file, in turns, in one run. Example:

    python benchmarks/conversion.py --rounds 3 --json outputs/conversion.json --check
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("SVT_LOG", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from numpy.typing import NDArray

from kuavo_smolvla_ros.data.convert import ConversionSettings, convert
from kuavo_smolvla_ros.data.episode import Episode
from kuavo_smolvla_ros.data.pool import in_processes, in_this_process
from kuavo_smolvla_ros.data.recordings import find_recordings
from kuavo_smolvla_ros.data.synthetic import TexturedFrames, signal, write_recipe
from kuavo_smolvla_ros.data.video import VideoSettings
from kuavo_smolvla_ros.robot.spec import RobotSpec, load_spec

SPEC = "kuavo_sim"  # three cameras of 640x480, 10 frames per second
STORED = 100  # different pictures per camera; longer episodes go round
INSTRUCTION = "Pick up the moving object"

# name: (target, at least or at most, why this much)
TARGETS = {
    "speed_over_lerobot_default": (5.0, ">=", "its PNG files cost five to eight times the encoding itself"),
    "speed_over_lerobot_streaming": (1.5, ">=", "the best it offers, with the same codec and quality"),
    "times_real_time": (3.0, ">=", "a day's recordings should be converted over night by a small machine"),
    "packed_times_real_time": (1.0, ">=", "the hardest ROS 1 packs; a day's recordings are done in a day"),
    "write_amplification": (1.1, "<=", "LeRobot writes a video file again for every episode in it"),
    "worker_peak_gb": (1.0, "<=", "a laptop has 8 GB and 8 cores; whatever the length of a recording"),
    "sample_read_ratio": (1.0, "<=", "training must not pay for fast conversion"),
}


@dataclass(frozen=True)
class StoredFrames:
    """Decoded pictures from a file, round and round."""

    path: str
    length: int
    height: int
    width: int
    offset: int

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        size = self.height * self.width * 3
        with open(self.path, "rb", buffering=0) as file:
            for step in range(self.length):
                file.seek((self.offset + step) % STORED * size)
                yield np.frombuffer(file.read(size), np.uint8).reshape(self.height, self.width, 3)


def store_frames(folder: Path, spec: RobotSpec) -> None:
    for number, (role, camera) in enumerate(spec.cameras.items()):
        with (folder / f"{role}.rgb").open("wb") as file:
            for frame in TexturedFrames(STORED, camera.height, camera.width, seed=number):
                file.write(frame.tobytes())


def episode(spec: RobotSpec, frames: str, length: int, seed: int) -> Episode:
    return Episode(
        source=f"recording {seed}",
        task="task1_moving_grasp",
        instruction=INSTRUCTION,
        fps=spec.fps,
        stamps_ns=np.arange(length, dtype=np.int64) * 100_000_000,
        state=signal(spec.state_names, length, spec.fps, seed),
        action=signal(spec.action_names, length, spec.fps, seed + 1),
        frames={
            role: StoredFrames(f"{frames}/{role}.rgb", length, camera.height, camera.width, seed * 7)
            for role, camera in spec.cameras.items()
        },
    )


def extract(path: Path, spec: RobotSpec, settings: Mapping[str, Any]) -> list[Episode]:
    return [episode(spec, settings["frames"], **recipe) for recipe in json.loads(path.read_text())]


def write_recordings(folder: Path, count: int, length: int) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(count):
        write_recipe(folder / f"{number:03d}.bag", {"length": length, "seed": number})
    return folder


def ours(folder: Path, frames: Path, root: Path, workers: int, video: VideoSettings) -> float:
    """Seconds to convert all recordings, starting the workers included."""
    shutil.rmtree(root, ignore_errors=True)
    settings = ConversionSettings(SPEC, video, {"frames": str(frames)})
    runner = in_processes(workers) if workers else in_this_process
    start = time.perf_counter()
    report = convert(find_recordings([folder]), root, settings, extract, runner=runner)
    seconds = time.perf_counter() - start
    if report.left_out:
        raise SystemExit(f"left out: {report.left_out}")
    return seconds


def lerobots(frames: Path, root: Path, spec: RobotSpec, count: int, length: int, streaming: bool) -> float:
    """Seconds for the same through LeRobot's add_frame and save_episode."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from kuavo_smolvla_ros.data.features import INDEX_COLUMNS, Layout, features

    shutil.rmtree(root, ignore_errors=True)
    described = {
        name: {key: tuple(v) if key == "shape" else v for key, v in feature.items() if key != "info"}
        for name, feature in features(Layout.of(spec), VideoSettings()).items()
        if name not in INDEX_COLUMNS
    }
    # Its queue must not overflow: it would drop pictures, and be measured on less work.
    dataset = LeRobotDataset.create(
        "benchmark/theirs",
        fps=int(spec.fps),
        features=described,
        root=root,
        streaming_encoding=streaming,
        encoder_queue_maxsize=length,
    )
    start = time.perf_counter()
    for seed in range(count):
        given = episode(spec, str(frames), length, seed)
        for step, pictures in enumerate(zip(*given.frames.values(), strict=True)):
            frame: dict[str, Any] = {
                "task": INSTRUCTION,
                "observation.state": given.state[step],
                "action": given.action[step],
            }
            frame |= {f"observation.images.{role}": p for role, p in zip(given.frames, pictures, strict=True)}
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return time.perf_counter() - start


def measure_throughput(work: Path, spec: RobotSpec, rounds: int, workers: int) -> dict[str, Any]:
    """Pictures per second of each way, median over rounds taken in turns."""
    length, many = 100, 6 * workers
    recordings = write_recordings(work / "recordings", many, length)
    h264 = VideoSettings("h264", crf=26, preset="ultrafast")
    rates: dict[str, list[float]] = {"default": [], "streaming": [], "ours": [], "ours_h264": []}
    for _ in range(rounds):
        images = 3 * length
        rates["default"].append(
            images / lerobots(work / "frames", work / "default", spec, 1, length, streaming=False)
        )
        rates["streaming"].append(
            images * 2 / lerobots(work / "frames", work / "theirs", spec, 2, length, streaming=True)
        )
        seconds = ours(recordings, work / "frames", work / "ours", workers, VideoSettings())
        rates["ours"].append(images * many / seconds)
        seconds = ours(recordings, work / "frames", work / "h264", workers, h264)
        rates["ours_h264"].append(images * many / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    sizes = {name: _video_bytes(work / name) for name in ("theirs", "ours", "h264")}
    per_frame = {
        "theirs": sizes["theirs"] / (2 * 3 * length),
        "ours": sizes["ours"] / (many * 3 * length),
        "ours_h264": sizes["h264"] / (many * 3 * length),
    }
    pairs = zip(rates["ours"], rates["default"], rates["streaming"], strict=True)
    over_default, over_streaming = zip(*((a / b, a / c) for a, b, c in pairs), strict=True)
    return {
        "pictures_per_s": medians,
        "kilobytes_per_picture": {name: value / 1e3 for name, value in per_frame.items()},
        "speed_over_lerobot_default": statistics.median(over_default),
        "speed_over_lerobot_streaming": statistics.median(over_streaming),
    }


def _video_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.mp4"))


def _written() -> int:
    """Bytes this process has passed to write calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def measure_writing(work: Path, spec: RobotSpec) -> dict[str, float]:
    """Bytes passed to write calls for every byte that stays, and LeRobot's figure for the same episodes."""
    count, length = 6, 60
    recordings = write_recordings(work / "recordings", count, length)
    start = _written()
    ours(recordings, work / "frames", work / "once", 0, VideoSettings())
    middle = _written()
    lerobots(work / "frames", work / "again", spec, count, length, streaming=True)
    end = _written()
    kept = [sum(p.stat().st_size for p in (work / n).rglob("*") if p.is_file()) for n in ("once", "again")]
    return {
        "write_amplification": (middle - start) / kept[0],
        "lerobot_write_amplification": (end - middle) / kept[1],
    }


def measure_memory(work: Path, length: int) -> dict[str, float]:
    """The largest resident size any worker process has had; a long recording among them."""
    recordings = write_recordings(work / "recordings", 1, length)
    ours(recordings, work / "frames", work / "long", 1, VideoSettings())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"worker_peak_gb": peak / 1e9, "worker_peak_at_frames": length}


def measure_real_time(work: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Seconds recorded per second of conversion: three 640x480 jpeg cameras at 30 Hz, states at 500 Hz."""
    from kuavo_smolvla_ros.data.recording_metadata import RecordingMetadata
    from kuavo_smolvla_ros.data.synthetic_bags import events, write

    spec = load_spec(SPEC)
    happened = events(spec, seconds)
    folder = work / "bags"
    for number in range(2 * workers):  # the sentence makes them different recordings
        metadata = RecordingMetadata.of(spec, "task1_moving_grasp", f"{INSTRUCTION} number {number}")
        write(folder / f"{number:02d}", spec, happened, "mcap", custom_data=metadata.to_custom_data())
    elapsed, used, report = _convert_bags(folder, work / "real_time", workers)
    megabytes = sum(recording.bytes for recording in find_recordings([folder])) / 1e6
    return {
        "recorded_s": report.seconds,
        "bag_megabytes_per_s": megabytes / elapsed,
        "core_seconds_per_recorded_second": used / report.seconds,
        "times_real_time": report.seconds / elapsed,
    }


def measure_packed(work: Path, workers: int, seconds: float) -> dict[str, Any]:
    """The same cameras and states in bags of ROS 1 whose chunks are packed with bz2."""
    from kuavo_smolvla_ros.data.synthetic_bags import START_NS, events, write

    spec, folder = load_spec(SPEC), work / "packed"
    folder.mkdir()
    for number in range(workers):
        happened = events(spec, seconds, is_ros1=True, start_ns=START_NS + number)
        write(folder / f"{number:02d}.bag", spec, happened, "bag-bz2")
    label = {"task": "task1_moving_grasp", "instruction": INSTRUCTION}
    elapsed, used, report = _convert_bags(folder, work / "from_packed", workers, label)
    return {
        "packed_core_seconds_per_recorded_second": used / report.seconds,
        "packed_times_real_time": report.seconds / elapsed,
    }


def _convert_bags(
    folder: Path, root: Path, workers: int, rules: Mapping[str, Any] | None = None
) -> tuple[float, float, Any]:
    """Seconds by the clock and of the processor, and the conversion's report."""
    from kuavo_smolvla_ros.data.episodes import extract as extract_episodes

    before = _processor_seconds()
    start = time.perf_counter()
    settings = ConversionSettings(SPEC, extract=rules or {})
    runner = in_processes(workers)
    report = convert(find_recordings([folder]), root, settings, extract_episodes, runner=runner)
    elapsed = time.perf_counter() - start
    if report.left_out:
        raise SystemExit(f"left out: {report.left_out}")
    return elapsed, _processor_seconds() - before, report


def _processor_seconds() -> float:
    """Of this process and those it has waited for; unlike the clock, deaf to what else the machine does."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure_reading(work: Path, spec: RobotSpec, samples: int) -> dict[str, Any]:
    """Milliseconds for a random training sample (three pictures) of each dataset, read in turns."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from kuavo_smolvla_ros.video_decoder import choose_video_backend

    count, length = 6, 100
    lerobots(work / "frames", work / "theirs", spec, count, length, streaming=True)
    recordings = write_recordings(work / "recordings", count, length)
    ours(recordings, work / "frames", work / "ours", 0, VideoSettings())
    backend = choose_video_backend()
    datasets = [
        LeRobotDataset("benchmark/read", root=work / name, video_backend=backend)
        for name in ("theirs", "ours")
    ]
    times: list[list[float]] = [[], []]
    order = np.random.default_rng(0).integers(0, count * length, samples)
    for place, index in enumerate(order):
        for which in (0, 1) if place % 2 else (1, 0):
            start = time.perf_counter()
            datasets[which][int(index)]
            times[which].append(time.perf_counter() - start)
    theirs_ms, ours_ms = (statistics.median(t) * 1e3 for t in times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return {
        "backend": backend,
        "lerobot_sample_ms": theirs_ms,
        "our_sample_ms": ours_ms,
        "sample_read_ratio": statistics.median(ratios),
    }


PARTS = ("memory", "writing", "real_time", "packed", "reading", "throughput")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns each side takes (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: one per core")
    parser.add_argument("--samples", type=int, default=200, help="random samples to read (default 200)")
    parser.add_argument("--long", type=int, default=3000, help="frames of the long recording (default 3000)")
    parser.add_argument("--seconds", type=float, default=20, help="length of the bags (default 20 s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure misses its target")
    return parser.parse_args(argv)


def _rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    return round(found, 3) if isinstance(found, float) else found


def disable_progress_bars() -> None:
    import datasets

    datasets.disable_progress_bars()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torchvision announces the end of its decoder
    disable_progress_bars()
    spec = load_spec(SPEC)
    with tempfile.TemporaryDirectory(prefix="conversion_") as folder:
        work = Path(folder)
        (work / "frames").mkdir()
        store_frames(work / "frames", spec)
        figures: dict[str, Any] = {"cores": os.cpu_count(), "workers": args.workers}
        measures = {
            "memory": lambda: measure_memory(work, args.long),
            "writing": lambda: measure_writing(work, spec),
            "real_time": lambda: measure_real_time(work, args.workers, args.seconds),
            "packed": lambda: measure_packed(work, args.workers, args.seconds / 2),
            "reading": lambda: measure_reading(work, spec, args.samples),
            "throughput": lambda: measure_throughput(work, spec, args.rounds, args.workers),
        }
        for name in args.only or PARTS:
            found = measures[name]()
            print(f"{name}: {json.dumps(_rounded(found))}", flush=True)
            figures |= found
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    missed = []
    parts = []
    for name, (target, sense, _) in TARGETS.items():
        if name not in figures:
            continue
        good = figures[name] >= target if sense == ">=" else figures[name] <= target
        parts.append(f"{name} {figures[name]:.2f} ({sense} {target:g}{'' if good else ', MISSED'})")
        if not good:
            missed.append(name)
    print("; ".join(parts))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
