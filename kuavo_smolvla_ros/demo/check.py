"""The shortest look: a made-up recording is held against the robot's description."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kuavo_smolvla_ros.demo.made_up import SECONDS, write_bag
from kuavo_smolvla_ros.demo.road import Place
from kuavo_smolvla_ros.errors import UserError

ROBOT = "kuavo_sim"
BAG = "made_up"


@dataclass(frozen=True)
class CheckStep:
    """Write a recording without any ROS, and read it back."""

    name = "check"
    title = "write a made-up recording and check it: rates, ages, gaps, shapes"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def commands(self, place: Place) -> Sequence[str]:
        return (f"kuavo-smolvla check {ROBOT} --bag {place.root / BAG}",)

    def run(self, place: Place) -> dict[str, Any]:
        from kuavo_smolvla_ros.data.bag_audit import audit_bag
        from kuavo_smolvla_ros.robot.audit import reports
        from kuavo_smolvla_ros.robot.spec import load_spec

        spec, bag = load_spec(ROBOT), place.root / BAG
        shutil.rmtree(bag, ignore_errors=True)
        bag.parent.mkdir(parents=True, exist_ok=True)
        write_bag(bag, spec, SECONDS)
        audits, damages = audit_bag(spec, bag)
        rows = reports(spec, audits)
        bad = [*damages, *(f"{row.topic}: {problem}" for row in rows for problem in row.problems)]
        if bad:
            raise UserError(f"{bag} does not fit {spec.name}: {'; '.join(bad)}")
        place.say(f"{len(rows)} streams of {SECONDS:g} s, all fit {spec.name}")
        names = ("topic", "count", "rate_hz", "shape")
        return {"streams": [{name: getattr(row, name) for name in names} for row in rows]}
