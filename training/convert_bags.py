#!/usr/bin/env python3
"""Recorded bags (ROS 1 .bag, ROS 2 mcap and sqlite3) become a LeRobot v3.0 dataset.

What the dataset does not hold yet is added. Interrupted and run again, it goes on where it was, and ends in
the same bytes. Every value of config/data/convert.yaml can be set as key=value.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kuavo_smolvla_ros.errors import exit_status

EPILOG = """example:
  python training/convert_bags.py bags=bags dataset=datasets/weighing robot=kuavo_bag task=task2_weighing
  python training/convert_bags.py --dry-run bags=bags dataset=datasets/weighing robot=kuavo_bag

exit status: 0 everything was converted, 1 something was left out or failed (it is listed), 2 used wrongly
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="bags, dataset and robot are needed"
    )
    parser.add_argument("--config", default="convert", help="a file of config/data (default convert)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("--cluster", metavar="ADDRESS", help="run on a Ray cluster ('local' starts one here)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write what was done and left out as JSON"
    )
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from kuavo_smolvla_ros.data.convert import convert, rehearse
    from kuavo_smolvla_ros.data.convert_config import load_conversion
    from kuavo_smolvla_ros.data.episodes import extract
    from kuavo_smolvla_ros.data.pool import in_processes
    from kuavo_smolvla_ros.data.recordings import Recording, find_recordings
    from kuavo_smolvla_ros.data.shard import RecordingShard
    from kuavo_smolvla_ros.robot.spec import load_spec

    config = load_conversion(args.overrides, args.config)
    recordings = find_recordings(config.bags)
    workers = min(config.workers, len(recordings))
    runner = in_processes(workers)
    if args.cluster:
        from kuavo_smolvla_ros.data.cluster import on_cluster

        runner = on_cluster(args.cluster, config.workers)
    fps = load_spec(config.settings.spec).fps
    start = time.monotonic()
    total = sum(recording.bytes for recording in recordings)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        seconds = episodes = left_out = 0.0

        def progress(recording: Recording, shard: RecordingShard | None) -> None:
            nonlocal seconds, episodes, left_out
            if shard is None:
                bar.total -= recording.bytes  # nothing to do, and no part of the rate
                return
            seconds += sum(episode.length for episode in shard.episodes) / fps
            episodes += len(shard.episodes)
            left_out += len(shard.rejections) + (shard.failure is not None)
            bar.update(recording.bytes)
            rate = seconds / (time.monotonic() - start)
            bar.set_postfix_str(
                f"{episodes:.0f} episodes, {left_out:.0f} left out, {rate:.1f}x real time", refresh=False
            )

        if args.dry_run:
            report = rehearse(
                recordings, config.dataset, config.settings, extract, runner=runner, progress=progress
            )
        else:
            report = convert(
                recordings,
                config.dataset,
                config.settings,
                extract,
                runner=runner,
                camera_threads=max(1, (os.cpu_count() or 1) // workers),
                retry_rejected=config.retry_rejected,
                progress=progress,
            )
    for source, reason in report.left_out:
        print(f"left out: {source}: {reason}")
    for traceback in report.tracebacks.values():
        print(traceback, file=sys.stderr)
    verb = "would add" if args.dry_run else "added"
    elapsed = time.monotonic() - start
    known = f", {report.known} recordings were there already" if report.known else ""
    print(
        f"{verb} {report.episodes} episodes ({report.frames} frames, {report.seconds:.1f} s) from "
        f"{report.converted + report.resumed} recordings to {config.dataset} in {elapsed:.1f} s{known}; "
        f"left out {len(report.left_out)}"
    )
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return 1 if report.left_out else 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return exit_status("convert_bags", lambda: run(args))
    except KeyboardInterrupt:
        print("convert_bags: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
