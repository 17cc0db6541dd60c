"""Report what this machine has, what each missing thing disables, and how to get it.

Exit status 1 where something is missing that is needed: Python, configuration and images always, and what
--need names (ros, sim, train) besides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kuavo_smolvla_ros.commands.environment import Finding

GROUPS = ("ros", "sim", "train")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--need",
        action="append",
        choices=GROUPS,
        default=[],
        help="also fail where this group is not complete (may be given more than once)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.epilog = "example: kuavo-smolvla doctor --need ros --need sim"


def verdict(findings: Sequence[Finding], needs: Sequence[str]) -> list[str]:
    """The names of the missing things that matter."""
    return [f.name for f in findings if not f.ok and f.need in ("core", *needs)]


def table(findings: Sequence[Finding]) -> str:
    width = max(len(finding.name) for finding in findings)
    lines = []
    for f in findings:
        lines.append(f"{'ok     ' if f.ok else 'missing'}  {f.name:<{width}}  {f.found}")
        if not f.ok:
            lines.append(f"{'':9}{'':{width}}  disables: {f.disables}")
            lines.append(f"{'':9}{'':{width}}  get it:   {f.get}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    from kuavo_smolvla_ros.commands.environment import PROBES, examine

    findings = [examine(probe) for probe in PROBES]
    bad = verdict(findings, args.need)
    if args.json:
        print(json.dumps({"ok": not bad, "findings": [asdict(f) for f in findings]}, indent=1))
        return int(bool(bad))
    print(table(findings))
    needs = ", ".join(("the core", *args.need))
    print(f"\n{needs}: " + (f"not complete ({', '.join(bad)})" if bad else "complete"))
    return int(bool(bad))
