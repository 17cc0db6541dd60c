"""Judge a dataset: what was wrong with its recordings and episodes, as a page for people and as JSON.

The page is one file that needs neither a server nor a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kuavo_smolvla_ros.errors import UserError

EPILOG = """examples:
  kuavo-smolvla report datasets/weighing
  kuavo-smolvla report datasets/weighing --against datasets/grasping --out outputs/report
  kuavo-smolvla report datasets/weighing --thresholds mine.yaml

exit status: 0 it passes the thresholds, 1 it does not, 2 used wrongly"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("dataset", type=Path, help="folder of a LeRobot v3.0 dataset")
    parser.add_argument("--against", type=Path, metavar="DATASET", help="an earlier dataset to compare with")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default outputs/report/NAME)"
    )
    parser.add_argument(
        "--thresholds", type=Path, metavar="FILE", help="YAML with thresholds that differ from quality.yaml"
    )
    parser.add_argument("--robot", help="the description, for a dataset that does not name its own")
    parser.add_argument(
        "--pictures", type=int, default=40, metavar="N", help="episodes shown with pictures (default 40)"
    )


def run(args: argparse.Namespace) -> int:
    import json

    from kuavo_smolvla_ros.data.quality_settings import QualitySettings
    from kuavo_smolvla_ros.data.report import VERDICTS, make_report
    from kuavo_smolvla_ros.data.report_page import render

    rules = QualitySettings.load(args.thresholds)
    report = make_report(
        args.dataset, rules, robot=args.robot, against=args.against, pictures=max(0, args.pictures)
    )
    out = args.out or Path("outputs/report") / args.dataset.resolve().name
    page, data = out / "report.html", out / "report.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(render(report))
        data.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error
    for finding in report.findings:
        print(f"{finding.severity.value}: {finding}")
    for failure in report.failures:
        print(f"fails: {failure}")
    counts = ", ".join(f"{report.verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    print(f"{len(report.episodes)} episodes ({counts}), left out {len(report.left_out)}; see {page}")
    return 1 if report.failures else 0
