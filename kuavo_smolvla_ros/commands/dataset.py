"""Look at a dataset, merge several, divide one, or take a part; no picture is encoded again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLE = """example:
  kuavo-smolvla dataset info datasets/weighing
  kuavo-smolvla dataset merge datasets/monday datasets/tuesday --into datasets/weighing
  kuavo-smolvla dataset split datasets/weighing --into datasets/weighing_ --shares train=0.9 validation=0.1
  kuavo-smolvla dataset subset datasets/weighing --episodes 0-99,120 --into datasets/weighing_100
  kuavo-smolvla dataset subset datasets/weighing --verdict good suspect --into datasets/weighing_clean
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser("info", help="robot, tasks, recordings, and what was left out")
    info.add_argument("dataset", type=Path)
    info.add_argument("--json", action="store_true", help="as JSON")
    merge = actions.add_parser("merge", help="all episodes of several datasets in one")
    merge.add_argument("datasets", type=Path, nargs="+")
    merge.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    split = actions.add_parser("split", help="divide by shares, recordings kept whole, each task by itself")
    split.add_argument("dataset", type=Path)
    split.add_argument(
        "--into", required=True, metavar="PREFIX", help="folders are PREFIX + name of the share"
    )
    split.add_argument("--shares", nargs="+", required=True, metavar="NAME=SHARE")
    split.add_argument("--seed", type=int, default=0)
    subset = actions.add_parser("subset", help="the chosen episodes")
    subset.add_argument("dataset", type=Path)
    subset.add_argument("--into", type=Path, required=True, metavar="FOLDER")
    chosen = subset.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--episodes", metavar="LIST", help="for example 0-99,120")
    chosen.add_argument("--without", metavar="LIST", help="all but these")
    chosen.add_argument(
        "--verdict",
        nargs="+",
        choices=("good", "suspect", "bad"),
        metavar="WORD",
        help="those that the quality report calls good, suspect or bad",
    )
    subset.add_argument(
        "--thresholds", type=Path, metavar="FILE", help="with --verdict: as for kuavo-smolvla report"
    )
    subset.add_argument("--robot", help="with --verdict: as for kuavo-smolvla report")


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.data import merge

    if args.action == "info":
        _print_info(merge.load_dataset(args.dataset), args.json)
    elif args.action == "merge":
        report = merge.merge(args.datasets, args.into)
        print(f"{args.into}: {report.episodes} episodes ({report.frames} frames) added")
    elif args.action == "split":
        shares = _shares(args.shares)
        roots = {name: Path(args.into + name) for name in shares}
        for name, report in merge.split(args.dataset, roots, shares, args.seed).items():
            print(f"{roots[name]}: {report.episodes} episodes ({report.frames} frames)")
    else:
        picked, reasons = _picked(args)
        report = merge.subset(args.dataset, args.into, picked, reasons)
        print(f"{args.into}: {report.episodes} episodes ({report.frames} frames)")
    return 0


def _picked(args: argparse.Namespace) -> tuple[set[int], dict[int, str]]:
    """The episodes asked for, and why each of the others was not."""
    from kuavo_smolvla_ros.data import merge
    from kuavo_smolvla_ros.data.quality_settings import QualitySettings
    from kuavo_smolvla_ros.data.report import make_report
    from kuavo_smolvla_ros.errors import UsageError

    if args.verdict:
        rules = QualitySettings.load(args.thresholds)
        judged = make_report(args.dataset, rules, robot=args.robot, pictures=0).episodes
        reasons = {e.index: e.why for e in judged if e.verdict not in args.verdict}
        picked = {e.index for e in judged} - set(reasons)
        if not picked:
            raise UsageError(f"no episode of {args.dataset} is {' or '.join(args.verdict)}")
        return picked, reasons
    if args.thresholds or args.robot:
        raise UsageError("--thresholds and --robot belong to --verdict")
    listed = parse_numbers(args.episodes or args.without)
    if args.episodes:
        return listed, {}
    return set(range(merge.load_dataset(args.dataset).info["total_episodes"])) - listed, {}


def parse_numbers(text: str) -> set[int]:
    """`0-3,7` is 0, 1, 2, 3, 7."""
    from kuavo_smolvla_ros.errors import UsageError

    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"'{part}' is neither a number nor a range such as 0-99")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _shares(given: list[str]) -> dict[str, float]:
    from kuavo_smolvla_ros.errors import UsageError

    shares = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            raise UsageError(f"'{item}' is no share such as train=0.9") from None
    return shares


def _print_info(dataset, as_json: bool) -> None:
    recordings = dataset.recordings
    rejected = [(name, r) for name, entry in recordings.items() for r in entry["rejected"]]
    tasks: dict[str, int] = {}
    for entry in recordings.values():
        for episode in entry["episodes"]:
            tasks[episode["task"]] = tasks.get(episode["task"], 0) + 1
    summary = {
        "robot": dataset.info["robot_type"],
        "fingerprint": dataset.identity["fingerprint"],
        "fps": dataset.info["fps"],
        "episodes": dataset.info["total_episodes"],
        "frames": dataset.info["total_frames"],
        "hours": round(dataset.info["total_frames"] / dataset.info["fps"] / 3600, 3),
        "recordings": len(recordings),
        "episodes_per_task": tasks,
        "instructions": dataset.identity["tasks"],
        "pictures": dataset.identity["pictures"],
        "left_out": [
            {"recording": name, "source": r["source"], "reason": r["reason"]} for name, r in rejected
        ],
    }
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    for key, value in summary.items():
        if key == "left_out":
            print(f"left out: {len(value)}")
            for item in value:
                print(f"  {item['recording']}: {item['reason']}")
        else:
            shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{key.replace('_', ' ')}: {shown}")
