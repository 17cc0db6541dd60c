"""Hold a recording or the live robot against a description: per stream what is there, and what does not fit.

Without --bag and --live only the description itself is checked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kuavo_smolvla_ros.errors import UsageError

if TYPE_CHECKING:
    from kuavo_smolvla_ros.robot.audit import StreamReport
    from kuavo_smolvla_ros.robot.description import RobotSpec

EPILOG = """examples:
  kuavo-smolvla check kuavo_sim
  kuavo-smolvla check kuavo_sim_bag --bag episode_000.bag
  kuavo-smolvla check kuavo --live --seconds 10

exit status: 0 everything fits, 1 something does not or cannot be read, 2 used wrongly"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("robot", help="name of a shipped description (kuavo_sim), or a YAML file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--bag", type=Path, help="a recording: ROS 1 .bag, or a rosbag2 folder, .mcap or .db3"
    )
    source.add_argument(
        "--live", action="store_true", help="listen to the robot (or simulator) that is running"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long to listen with --live (default 5)"
    )
    parser.add_argument("--loopback", action="store_true", help="with --live: look on this machine only")
    parser.add_argument(
        "--sim-time", action="store_true", help="with --live: ages by /clock, for a simulator"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.robot.audit import reports
    from kuavo_smolvla_ros.robot.spec import load_spec

    if args.seconds <= 0:
        raise UsageError(f"--seconds {args.seconds:g}: must be above 0")
    spec = load_spec(args.robot)
    print(_headline(spec))
    if args.bag is None and not args.live:
        return 0
    conditions: Sequence[str] = ()
    damages: Sequence[str] = ()
    if args.bag is not None:
        from kuavo_smolvla_ros.data.bag_audit import audit_bag

        audits, damages = audit_bag(spec, args.bag)
    else:
        from kuavo_smolvla_ros import dds

        dds.apply(loopback=args.loopback)
        from kuavo_smolvla_ros.nodes.live_audit import listen

        audits, conditions = listen(spec, args.seconds, sim_time=args.sim_time)
    rows = reports(spec, audits)
    print(format_table(rows))
    for text in (*damages, *conditions):
        print(f"  ! {text}")
    if args.json is not None:
        document = {
            "robot": spec.name,
            "fingerprint": spec.fingerprint,
            "streams": [r.to_dict() for r in rows],
        }
        document |= {"preconditions": list(conditions), "damages": list(damages)}
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    bad = sum(bool(row.problems) for row in rows) + len(conditions)
    verdict = f"{bad} that do not fit" if bad else "all fit"
    damaged = f"; the recording is damaged in {len(damages)} places" if damages else ""
    print(f"{len(rows)} streams, {verdict}{damaged}")
    return 1 if bad or damages else 0


def _headline(spec: RobotSpec) -> str:
    parts = [
        f"state {len(spec.state_names)}",
        f"action {len(spec.action_names)}",
        f"{len(spec.cameras)} cameras",
    ]
    if spec.hold_names:
        parts.append(f"{len(spec.hold_names)} joints held")
    parts.append(f"{spec.fps:g} fps")
    return f"{spec.name}: {', '.join(parts)}, limits '{spec.limit_profile}', fingerprint {spec.fingerprint}"


def format_table(rows: Sequence[StreamReport]) -> str:
    """Aligned columns; what does not fit stands below its stream."""
    head = ("stream", "topic", "count", "Hz", "age p50", "p99 ms", "gap ms", "skew ms", "content")
    body = [
        (
            f"{row.stream} ({row.direction})",
            row.topic,
            str(row.count) if row.direction == "in" or row.count else "-",
            *(
                _number(v)
                for v in (row.rate_hz, row.age_p50_ms, row.age_p99_ms, row.gap_max_ms, row.skew_p99_ms)
            ),
            row.shape or "-",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        left = {0, 1, len(head) - 1}
        padded = (
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    lines = [line(head)]
    for row, cells in zip(rows, body, strict=True):
        lines.append(line(cells))
        lines += [f"  ! {problem}" for problem in row.problems]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
