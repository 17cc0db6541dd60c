"""The tasks' samples side by side, each with its own sentence, brought to one shape for a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, default_collate

from kuavo_smolvla_ros.learning.holding import hold
from kuavo_smolvla_ros.learning.replay import ReplayDatasetManager
from kuavo_smolvla_ros.learning.sampler import Draw
from kuavo_smolvla_ros.learning.sources import ACTION, IMAGES, STATE, DataError, TaskSource, widest
from kuavo_smolvla_ros.learning.stage import TaskData
from kuavo_smolvla_ros.policy.dimensions import ACTION_STEP_PADDING, mix_samples, pad_sample
from kuavo_smolvla_ros.policy.images import FEATURES


class FeatureRows(Protocol):
    """Vision features by frame."""

    def read(self, frame: int, /) -> torch.Tensor: ...


TASK_NUMBER = "task_number"  # of the curriculum, for counting and for losses per task
FRAME = "frame"  # number in the task's data


class Standing:
    """Completes samples of robots that do not walk, in a mix with one that does: its base is at 0 and counts.

    The flag is known to be 0. Where a base that stands would go is never executed, but it is no padding
    either: the policy of the mix decides these values, and what nothing has taught wanders while a chunk is
    made. The network has never seen arms beside such values, and they go astray as well.
    """

    def __init__(self, sources: Sequence[TaskSource]) -> None:
        self._sources = tuple(sources)
        wide = widest([source.facts for source in sources])
        self._names, flags = wide.action_names, wide.flags
        self._width = len(self._names)
        self._base_ends = max(flags) + 1 if flags else 0

    def known(self, source: TaskSource) -> tuple[int, ...]:
        """Dimensions that samples of this source do not have, and are 0 in: a base, up to its flag."""
        return tuple(self._base_beyond(source.facts.widths[ACTION]))

    def _base_beyond(self, width: int) -> range:
        """The base's dimensions, up to its flag, that actions of this width lack."""
        return range(width, self._base_ends)

    def advice(self) -> list[str]:
        """A sentence for each task that says nothing about values the mix's policy decides."""
        sentences = []
        for source in self._sources:
            unknown = self._names[max(source.facts.widths[ACTION], self._base_ends) :]
            if unknown:
                sentences.append(
                    f"nothing in {source.name} teaches {', '.join(unknown)}, as other tasks of the stage do: "
                    "at that task these values will wander while a chunk is made, and may lead the others "
                    "astray. Demonstrate them there too, if only at rest"
                )
        return sentences

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        base = self._base_beyond(sample[ACTION].shape[-1])
        return pad_sample(sample, {ACTION: self._width}, {ACTION: base}) if base else sample


class MixedDataset(Dataset[dict[str, Any]]):
    """Samples by `Draw`; a sample's sentence is its own task's, whatever its data set was recorded with.

    `standing` is that of a larger mix which these tasks are a part of.
    """

    def __init__(
        self, tasks: Sequence[TaskData], sources: Sequence[TaskSource], standing: Standing | None = None
    ) -> None:
        if [task.name for task in tasks] != [source.name for source in sources]:
            raise DataError(
                f"tasks {', '.join(t.name for t in tasks)} do not match the data of "
                f"{', '.join(s.name for s in sources)}"
            )
        self.tasks, self.sources = tuple(tasks), tuple(sources)
        self.cameras = tuple(sources[0].facts.cameras)
        self._standing = Standing(sources) if standing is None else standing
        self._features: tuple[FeatureRows, ...] | None = None  # by task

    @classmethod
    def of_manager(cls, manager: ReplayDatasetManager) -> MixedDataset:
        return cls(manager.stage.tasks, manager.sources)

    def with_features(self, features: Sequence[FeatureRows]) -> MixedDataset:
        """The same samples with rows of vision features (one file per task) in the place of pictures."""
        other = copy.copy(self)
        other._features = tuple(features)
        return other

    def __len__(self) -> int:
        return sum(len(source.frames) for source in self.sources)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        task, source = self.tasks[draw.task], self.sources[draw.task]
        pictures: tuple[str, ...] = ()
        if self._features is None:
            sample = source.frames[draw.frame]
            pictures = tuple(IMAGES + camera for camera in self.cameras)
        else:
            sample = dict((source.vectors or source.frames)[draw.frame])
            sample[FEATURES] = self._features[draw.task].read(draw.frame)
            pictures = (FEATURES,)
        # Chosen by name: data sets carry further columns, and not all the same.
        keys = (STATE, ACTION, ACTION_STEP_PADDING, *pictures)
        absent = [key for key in keys if key not in sample]
        if absent:
            raise DataError(f"frame {draw.frame} of {task.name} has no {', '.join(absent)}")
        for key, width in source.facts.widths.items():
            if sample[key].shape[-1] != width:
                raise DataError(
                    f"{key} of frame {draw.frame} of {task.name} is {sample[key].shape[-1]} wide, its data "
                    f"set says {width}"
                )
        chosen = {key: _compact(sample[key]) if key.startswith(IMAGES) else sample[key] for key in keys}
        own = task.sentences
        if draw.sentence < len(own):
            sentence = own[draw.sentence]
        else:
            sentence = task.hold_sentences[draw.sentence - len(own)]
            chosen = hold(chosen, source.facts, task.name)
        return {
            **self._standing(chosen),
            "task": sentence,
            TASK_NUMBER: task.number,
            FRAME: draw.frame,
        }


def _compact(picture: torch.Tensor) -> torch.Tensor:
    """A picture in the eight bits it came from: a quarter of the bytes to copy, pin and send."""
    return picture if picture.dtype == torch.uint8 else (picture * 255).round().to(torch.uint8)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch; vectors of different widths are padded and masked, sentences stay a list of texts."""
    return default_collate(mix_samples(samples))


def validation_draws(manager: ReplayDatasetManager, task: TaskData) -> list[Draw]:
    """A task's validation frames with its instruction, always the same ones."""
    index = manager.stage.task_names.index(task.name)
    return [Draw(index, frame, 0) for frame in manager.validation_frames(task).tolist()]
