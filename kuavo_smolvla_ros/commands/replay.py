"""Run the executor again on what it recorded before a stop: what happened, and whether it decides the same.

The executor writes such a file at every stop (outputs/flight unless told otherwise).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kuavo_smolvla_ros.nodes.flight_replay import Difference, Event, Flight, Story

EPILOG = """example:
  kuavo-smolvla replay outputs/flight/flight_20250102T030405.678Z_policy_lost.mcap

exit status: 0 the same decisions, 1 other ones or a damaged file, 2 used wrongly"""

EVENTS_SHOWN = 40


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("file", type=Path, help="what the executor recorded at a stop")
    parser.add_argument("--all", action="store_true", help=f"every event, not only the last {EVENTS_SHOWN}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all of it to FILE")


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.nodes.flight_replay import read_flight, replay, tell

    flight = read_flight(args.file)
    story = tell(flight)
    print("\n".join(describe(flight, story, None if args.all else EVENTS_SHOWN)))
    difference = replay(flight)
    print(_verdict(flight, difference))
    if args.json is not None:
        args.json.write_text(json.dumps(document(flight, story, difference), indent=2) + "\n")
    return 0 if difference is None else 1


def describe(flight: Flight, story: Story, events: int | None) -> list[str]:
    """The table: what it is, what happened when, and what was refused or limited how often."""
    about = flight.about
    dry = " (dry run)" if about["dry_run"] == "True" else ""
    lines = [
        f"{about['reason']}{dry}: {about['detail']}",
        f"{about['robot']} ({about['fingerprint']}), limits '{about['limits']}', {about['node']}, "
        f"software {about['software']}, {about['ended']}",
        f"{len(flight.inputs)} periods in {flight.seconds:.2f} s, "
        f"the longest {story.longest_period_s * 1e3:.1f} ms",
        "",
        f"{'seconds':>9}  {'what':8}",
    ]
    shown = story.events if events is None else story.events[-events:]
    if len(shown) < len(story.events):
        lines.append(f"{'':9}  {len(story.events) - len(shown)} earlier events (--all shows them)")
    lines += [_row(event) for event in shown]
    refused = ", ".join(f"{count} {reason}" for reason, count in story.refusals.most_common())
    lines += ["", f"chunks: {story.accepted} accepted" + (f", refused: {refused}" if refused else "")]
    if story.limited:
        lines.append("limited, in periods:")
        lines += [f"  {joint:24}{count:7}" for joint, count in sorted(story.limited.items())]
    else:
        lines.append("limited: no joint")
    return lines


def _row(event: Event) -> str:
    return f"{event.time_s:9.3f}  {event.kind:8}  {event.text}"


def _verdict(flight: Flight, difference: Difference | None) -> str:
    if difference is None:
        return f"same decisions in all {len(flight.inputs)} periods"
    where = f"period {difference.period} ({difference.time_s:.3f} s)"
    return f"other decisions from {where} on: {difference.sentence}"


def document(flight: Flight, story: Story, difference: Difference | None) -> dict[str, Any]:
    """All of it for a program."""
    return {
        "about": dict(flight.about),
        "periods": len(flight.inputs),
        "seconds": flight.seconds,
        "longest_period_s": story.longest_period_s,
        "events": [asdict(event) for event in story.events],
        "chunks": {"accepted": story.accepted, "refused": dict(story.refusals)},
        "limited": story.limited,
        "same": difference is None,
        "difference": None if difference is None else asdict(difference),
    }
