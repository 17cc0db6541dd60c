"""Whether a checkpoint can be what a stage goes on from: the same robot, or one this robot extends."""

from __future__ import annotations

from pathlib import Path

from kuavo_smolvla_ros.learning.sources import ACTION, STATE, Facts
from kuavo_smolvla_ros.learning.stage import StageError
from kuavo_smolvla_ros.policy.checkpoint import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    STATISTICS_FILE,
    read_json,
    read_statistics,
)
from kuavo_smolvla_ros.policy.dimensions import Statistics


def inherited_statistics(folder: Path, facts: Facts, fingerprint: str | None) -> Statistics | None:
    """The statistics a checkpoint hands on to data with these facts, of the robot with this fingerprint.

    None for plain SmolVLA, whose numbers are of other robots, and for weights that no data have met. Fails
    with one sentence where the checkpoint speaks of other joints or cameras than the data at hand.
    """
    if not (folder / CHECKPOINT_FILE).is_file():
        return None
    config, identity = read_json(folder / CONFIG_FILE), read_json(folder / CHECKPOINT_FILE)
    vectors = (
        (STATE, config["state_names"], facts.state_names),
        (ACTION, config["action_names"], facts.action_names),
    )
    for what, theirs, ours in vectors:
        for place, name in enumerate(theirs):
            here = ours[place] if place < len(ours) else "nothing"
            if name != here:
                raise StageError(
                    f"{folder} was trained with {what}[{place}] = {name}, the data has {here} there; start "
                    "from a checkpoint of this robot"
                )
    if set(config["cameras"]) != set(facts.cameras):
        raise StageError(
            f"{folder} was trained with the cameras {', '.join(sorted(config['cameras']))}, the data has "
            f"{', '.join(sorted(facts.cameras))}"
        )
    stored = identity["robot_fingerprint"]
    same_layout = all(len(theirs) == len(ours) for _, theirs, ours in vectors)
    if None not in (stored, fingerprint) and same_layout and stored != fingerprint:
        raise StageError(
            f"{folder} was trained for the robot with fingerprint {stored}, the data was recorded on "
            f"{fingerprint}: names, units, cameras or rate differ; start from a checkpoint of this "
            "robot, or convert the data with its description"
        )
    return read_statistics(folder) if (folder / STATISTICS_FILE).is_file() else None
