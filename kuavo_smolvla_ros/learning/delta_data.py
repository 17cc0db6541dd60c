"""Samples for training a delta expert from a cache: no pictures are read, and the base is not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kuavo_smolvla_ros.learning.delta_cache import CachedTask
from kuavo_smolvla_ros.learning.mixed_dataset import FRAME, TASK_NUMBER, Standing
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import ACTION, STATE, TaskSource
from kuavo_smolvla_ros.learning.stage import TaskData
from kuavo_smolvla_ros.policy.delta_policy import BASE_CHUNKS, IMAGE_TOKENS, KNOWN_AGES, LATER_STATES
from kuavo_smolvla_ros.policy.dimensions import (
    ACTION_STEP_PADDING,
    DIMENSION_PADDING,
    Statistics,
    normalise,
    pad_last,
)
from kuavo_smolvla_ros.policy.language import TOKEN_MASK, TOKENS
from kuavo_smolvla_ros.policy.steps import TokenizeInstruction


class DeltaDataset(Dataset[dict[str, Any]]):
    """Samples by `Draw`: a frame's vectors, what the base says of it, and the states that came after it."""

    def __init__(
        self,
        tasks: Sequence[TaskData],
        sources: Sequence[TaskSource],
        cached: Sequence[CachedTask],
        standing: Standing,
        max_age: int,
        state_width: int,
    ) -> None:
        self._tasks, self._cached = tuple(tasks), tuple(cached)
        self._episodes = tuple(source.episodes for source in sources)
        self._ages, self._state_width = max_age + 1, state_width
        self._standing = standing

    def __len__(self) -> int:
        return sum(len(cached.state) for cached in self._cached)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        task, cached = self._tasks[draw.task], self._cached[draw.task]
        row = int(cached.row[draw.frame])
        later = self._later_rows(draw)
        states = torch.from_numpy(cached.state[[*later, *[later[-1]] * (self._ages - len(later))]])
        sample = {
            STATE: torch.from_numpy(np.array(cached.state[row])),
            ACTION: torch.from_numpy(np.array(cached.action[row])),
            ACTION_STEP_PADDING: torch.from_numpy(np.array(cached.past_end[row])),
            BASE_CHUNKS: torch.from_numpy(np.array(cached.chunks[row])),
            IMAGE_TOKENS: cached.image_tokens(row),
            LATER_STATES: pad_last(states, self._state_width),
            KNOWN_AGES: len(later),
            "task": task.sentences[draw.sentence],
            TASK_NUMBER: task.number,
            FRAME: draw.frame,
        }
        return self._standing(sample)

    def _later_rows(self, draw: Draw) -> list[int]:
        """The rows of this frame and those after it, as far as they are of its episode and cached."""
        rows, episodes = self._cached[draw.task].row, self._episodes[draw.task]
        found = []
        for frame in range(draw.frame, min(draw.frame + self._ages, len(rows))):
            if rows[frame] < 0 or episodes[frame] != episodes[draw.frame]:
                break
            found.append(int(rows[frame]))
        return found


class DeltaPreprocess:
    """A collated batch of such samples made ready: normalised, the sentence as tokens, on the device."""

    def __init__(self, statistics: Statistics, tokenize: TokenizeInstruction, device: torch.device) -> None:
        self._statistics, self._tokenize, self._device = statistics, tokenize, device

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        batch = {key: self._send(value) for key, value in raw.items() if isinstance(value, Tensor)}
        step = self._tokenize
        ids, mask = step.tokenizer(raw["task"], step.max_length, step.padding)
        batch[TOKENS], batch[TOKEN_MASK] = self._send(ids), self._send(mask)
        state, action = self._statistics[STATE], self._statistics[ACTION]
        padding = {key: batch.get(name) for key, name in DIMENSION_PADDING.items()}
        if LATER_STATES in batch:
            wider = padding[STATE]
            missing = batch[LATER_STATES].shape[-1] - batch[STATE].shape[-1]
            if wider is not None and missing:
                wider = torch.nn.functional.pad(wider, (0, missing), value=True)
            batch[LATER_STATES] = normalise(batch[LATER_STATES], state, wider)
        batch[STATE] = normalise(batch[STATE], state, padding[STATE])
        batch[ACTION] = normalise(batch[ACTION], action, padding[ACTION])
        return batch

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)
