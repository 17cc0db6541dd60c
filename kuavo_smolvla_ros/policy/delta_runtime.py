"""Refining the chunk under way: a new state in, the rest of the chunk out, in the robot's units.

Making a chunk takes pictures through vision encoder and language model. Refining what is left of one takes a
newer state through the delta expert only; what pictures and sentence said is kept from when the chunk was
made. So it is much cheaper, and blind to what pictures would have shown since.
"""

from __future__ import annotations

import numpy as np
import torch

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.delta_policy import refine_rest
from kuavo_smolvla_ros.policy.dimensions import STATE, normalise
from kuavo_smolvla_ros.policy.runtime import PolicyRunner


def refine_remaining(runner: PolicyRunner, state: np.ndarray, age: int) -> np.ndarray:
    """Actions (chunk_size - age, width) that remain of the runner's last chunk, given the robot's state now.

    `age` is how many steps have passed since the observation that chunk was made from; above the policy's
    `delta_max_age`, or when no chunk was made, this is an error.
    """
    policy = runner.policy
    width = policy.config.widths[STATE]
    state = np.asarray(state, dtype=np.float32)
    if state.shape != (width,):
        raise UsageError(f"the state has shape {state.shape}, the policy needs ({width},)")
    if not np.isfinite(state).all():
        raise UsageError("the state holds values that are not finite")
    now = normalise(torch.from_numpy(state)[None], policy.statistics[STATE])
    return runner.postprocessor(refine_rest(policy, now, age))[0, age:].numpy()
