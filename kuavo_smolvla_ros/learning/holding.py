"""What a robot should do when it is told something that does not belong to what it sees: stay where it is.

Recordings of different tasks show different scenes, so a policy can do each of them without hearing a word.
Such samples are where it has to listen: the pictures of a task, the sentence of another one, and arms that
hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kuavo_smolvla_ros.learning.sources import ACTION, STATE, DataError, Facts
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING

_ANGLE = "rad"


def hold(sample: Mapping[str, Any], facts: Facts, name: str) -> dict[str, Any]:
    """The sample with a chunk that stays: arms where they are, a gripper as it is told now, a base that
    stands.

    Arms hold the state and not the first action, which is already ahead of it: held from chunk to chunk, they
    would go on with their task, only slower. What a gripper holds it would drop, held at the opening it has.
    """
    arms = [
        place
        for place, joint in enumerate(facts.action_names)
        if joint in facts.state_names and facts.units.get(joint) == _ANGLE
    ]
    if not arms:
        raise DataError(
            f"the data set of {name} does not say which joints are angles, so nobody knows how its robot "
            "holds still: convert it with this package, or set task.hold_share=0"
        )
    target = sample[ACTION][0].clone()
    target[arms] = sample[STATE][[facts.state_names.index(facts.action_names[place]) for place in arms]]
    target[list(facts.flags)] = 0.0
    chunk = target.expand_as(sample[ACTION]).clone()
    # It may hold on beyond the end of the episode.
    return {**sample, ACTION: chunk, ACTION_STEP_PADDING: torch.zeros_like(sample[ACTION_STEP_PADDING])}
