"""Whether a checkpoint can be what a stage goes on from: the same robot, or one this robot extends."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.learning.sources import ACTION, STATE, Facts
from kuavo_smolvla_ros.learning.stage import StageError
from kuavo_smolvla_ros.policy.checkpoint import CHECKPOINT_FILE, CONFIG_FILE, read_json, read_statistics
from kuavo_smolvla_ros.policy.dimensions import Statistics


def inherited_statistics(folder: Path, facts: Facts) -> Statistics | None:
    """The statistics a checkpoint hands on; None for plain SmolVLA, whose numbers are of other robots.

    Fails with one sentence where the checkpoint speaks of other joints or cameras than the data at hand.
    """
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    config, identity = read_json(folder / CONFIG_FILE), read_json(folder / CHECKPOINT_FILE)
    for what, theirs, ours in (
        (STATE, config["state_names"], facts.state_names),
        (ACTION, config["action_names"], facts.action_names),
    ):
        for place, (a, b) in enumerate(zip(theirs, ours, strict=False)):
            if a != b:
                raise StageError(
                    f"{folder} was trained with {what}[{place}] = {a}, the data has {b} there; start from a "
                    "checkpoint of this robot"
                )
    if set(config["cameras"]) != set(facts.cameras):
        raise StageError(
            f"{folder} was trained with the cameras {', '.join(sorted(config['cameras']))}, the data has "
            f"{', '.join(sorted(facts.cameras))}"
        )
    statistics = read_statistics(folder)
    stored = identity["robot_fingerprint"]
    same_layout = len(facts.action_names) == statistics[ACTION].width
    if None not in (stored, facts.fingerprint) and same_layout and stored != facts.fingerprint:
        raise StageError(
            f"{folder} was trained for the robot with fingerprint {stored}, the data was recorded on "
            f"{facts.fingerprint}: names, units, cameras or rate differ; start from a checkpoint of this "
            "robot, or convert the data with its description"
        )
    return statistics
