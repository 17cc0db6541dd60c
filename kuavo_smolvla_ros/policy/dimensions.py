"""Vectors of any width up to the network's: padding, cropping, mixing widths in one batch, normalisation.

Statistics belong to dimensions, not to tasks: once a dimension has been seen, its mean and deviation never
change again, and a wider data set only adds dimensions behind them. Padding is left alone by normalisation
(mean 0, deviation 1), and stays exactly zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UserError

STATE, ACTION = "observation.state", "action"
ACTION_STEP_PADDING = "action_is_pad"
# Names with "_is_pad" pass through lerobot's processors; other unknown names are dropped on the way.
DIMENSION_PADDING = {STATE: "observation.state_dim_is_pad", ACTION: "action_dim_is_pad"}

# Joint radians and gripper openings. Statistics stay those of the task that was first: a joint that stood
# still there is moved by a later one, and would weigh hundreds of times what the others do, as sensor noise
# would on the robot. Joints that move deviate by 0.1 to 0.7 rad, so no joint becomes coarser than those.
DEFAULT_STD_FLOOR = 0.2


class StatisticsError(UserError):
    """Normalisation statistics are absent, incomplete or of the wrong width."""


def pad_last(x: Tensor, width: int) -> Tensor:
    """Append zeros to the last dimension up to `width`."""
    missing = width - x.shape[-1]
    if missing < 0:
        raise UserError(f"a vector of {x.shape[-1]} values does not fit into the network's {width}")
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def dimension_padding(batch: Mapping[str, Any], key: str, width: int) -> Tensor:
    """(B, width) mask of the dimensions of `batch[key]` that are padding, from its width and its own mask."""
    value = batch[key]
    real = value.shape[-1]
    if real > width:
        raise UserError(f"{key} is {real} wide; the network takes at most {width}")
    mask = torch.arange(width, device=value.device).expand(value.shape[0], -1) >= real
    own = batch.get(DIMENSION_PADDING[key])
    if own is None:
        return mask
    if own.dtype != torch.bool or own.shape != (value.shape[0], real):
        raise UserError(
            f"{DIMENSION_PADDING[key]} must be boolean of shape {(value.shape[0], real)}, "
            f"it is {own.dtype} of shape {tuple(own.shape)}"
        )
    return mask | torch.nn.functional.pad(own, (0, width - real), value=True)


def pad_sample(
    sample: Mapping[str, Any], widths: Mapping[str, int], zeros: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """One data set sample with state and action padded to common widths and the masks that say so.

    `zeros` are dimensions behind the sample's own of which it is known that they are 0 (that a robot without
    a base does not walk): they are no padding. A mask that the sample has already stays.
    """
    padded = dict(sample)
    for key, width in widths.items():
        value, own = sample[key], sample.get(DIMENSION_PADDING[key])
        padded[key] = pad_last(value, width)
        mask = torch.arange(width, device=value.device) >= value.shape[-1]
        if own is not None:
            mask[: value.shape[-1]] = own
        mask[[place for place in (zeros or {}).get(key, ()) if place >= value.shape[-1]]] = False
        padded[DIMENSION_PADDING[key]] = mask
    return padded


def mix_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples of different widths, each padded to the widest: ready for torch's default collation."""
    keys = [key for key in (STATE, ACTION) if all(key in sample for sample in samples)]
    widths = {key: max(sample[key].shape[-1] for sample in samples) for key in keys}
    return [pad_sample(sample, widths) for sample in samples]


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and deviation per dimension of one feature; the deviation already has its floor."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise StatisticsError(f"{len(self.mean)} means but {len(self.std)} deviations")

    @property
    def width(self) -> int:
        return len(self.mean)

    def tensors(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation for `width` dimensions, the identity beyond those known."""
        return _statistics_tensors(self, width, device)

    def extended_by(self, other: FeatureStatistics) -> FeatureStatistics:
        """These, followed by the dimensions only `other` has."""
        return FeatureStatistics(self.mean + other.mean[self.width :], self.std + other.std[self.width :])


@lru_cache(maxsize=64)  # else every batch would copy these few numbers to the device again
def _statistics_tensors(
    feature: FeatureStatistics, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    rest = max(width - feature.width, 0)
    mean = torch.tensor((*feature.mean, *(0.0,) * rest)[:width], dtype=torch.float32, device=device)
    std = torch.tensor((*feature.std, *(1.0,) * rest)[:width], dtype=torch.float32, device=device)
    return mean, std


class Statistics(dict[str, FeatureStatistics]):
    """Statistics by feature name (`observation.state`, `action`)."""

    @classmethod
    def from_dataset(
        cls,
        stats: Mapping[str, Mapping[str, Any]] | None,
        widths: Mapping[str, int],
        std_floor: float = DEFAULT_STD_FLOOR,
    ) -> Statistics:
        """Take mean and std of every feature in `widths` from a LeRobot data set's statistics, or say what
        is missing.
        """
        stats = stats or {}
        missing = [key for key in widths if key not in stats]
        if missing:
            raise StatisticsError(
                f"no normalisation statistics for {', '.join(missing)} (present: "
                f"{', '.join(sorted(stats)) or 'none'}). "
                "Pass the statistics of the data set the policy is trained on (dataset.meta.stats)"
            )
        return cls({key: _checked(key, stats[key], width, std_floor) for key, width in widths.items()})

    @classmethod
    def identity(cls, widths: Mapping[str, int]) -> Statistics:
        """Mean 0, deviation 1: for vectors that are normalised already, and for tests."""
        return cls({key: FeatureStatistics((0.0,) * w, (1.0,) * w) for key, w in widths.items()})

    @classmethod
    def from_flat(cls, flat: Mapping[str, Tensor]) -> Statistics:
        """Inverse of `to_flat`."""
        keys = sorted({name.rsplit(".", 1)[0] for name in flat})
        try:
            return cls(
                {
                    key: FeatureStatistics(
                        tuple(flat[f"{key}.mean"].tolist()), tuple(flat[f"{key}.std"].tolist())
                    )
                    for key in keys
                }
            )
        except KeyError as missing:
            raise StatisticsError(f"the stored statistics lack {missing}") from missing

    def to_flat(self) -> dict[str, Tensor]:
        """Tensors under `<feature>.mean` and `<feature>.std`, as lerobot stores them."""
        flat = {}
        for key, feature in self.items():
            flat[f"{key}.mean"], flat[f"{key}.std"] = feature.tensors(feature.width, torch.device("cpu"))
        return flat

    def extended_by(self, other: Statistics) -> Statistics:
        """These, plus what only `other` knows: whole features, and dimensions behind the known ones."""
        merged = Statistics(other)
        for key, feature in self.items():
            merged[key] = feature.extended_by(other[key]) if key in other else feature
        return merged

    def differs_on_known(self, other: Statistics) -> list[str]:
        """Features whose common dimensions have other numbers in `other`."""
        changed = []
        for key in self.keys() & other.keys():
            common = min(self[key].width, other[key].width)
            if (self[key].mean[:common], self[key].std[:common]) != (
                other[key].mean[:common],
                other[key].std[:common],
            ):
                changed.append(key)
        return sorted(changed)

    def require(self, widths: Mapping[str, int]) -> None:
        """Fail unless every feature has statistics for each of its dimensions."""
        for key, width in widths.items():
            known = self[key].width if key in self else 0
            if known < width:
                raise StatisticsError(
                    f"{key} is {width} wide but statistics exist for {known} dimensions; "
                    "without them the values would reach the network unscaled"
                )

    @property
    def sha256(self) -> str:
        """Hash of names, widths and the exact single-precision numbers."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.to_flat().items()):
            digest.update(f"{name}:{tensor.numel()}:".encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def normalise(x: Tensor, feature: FeatureStatistics, padding: Tensor | None = None) -> Tensor:
    """(B, ..., W) raw values to deviations from the mean; where `padding` (B, W) is True the result is
    zero.
    """
    mean, std = feature.tensors(x.shape[-1], x.device)
    scaled = (x.to(torch.float32) - mean) / std
    if padding is None:
        return scaled
    return torch.where(padding.view(padding.shape[0], *(1,) * (x.ndim - 2), -1), 0.0, scaled)


def denormalise(x: Tensor, feature: FeatureStatistics) -> Tensor:
    """Inverse of `normalise` on real dimensions."""
    mean, std = feature.tensors(x.shape[-1], x.device)
    return x.to(torch.float32) * std + mean


def _checked(key: str, stats: Mapping[str, Any], width: int, std_floor: float) -> FeatureStatistics:
    absent = [name for name in ("mean", "std") if name not in stats]
    if absent:
        raise StatisticsError(f"the statistics of {key} lack {' and '.join(absent)}")
    mean, std = (
        torch.as_tensor(stats[name]).detach().to("cpu", torch.float32).flatten() for name in ("mean", "std")
    )
    if mean.numel() != width or std.numel() != width:
        raise StatisticsError(
            f"{key} is {width} wide but its statistics are {mean.numel()} (mean) and {std.numel()} (std) wide"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std >= 0).all()):
        raise StatisticsError(f"the statistics of {key} hold values that are not finite, or a negative std")
    return FeatureStatistics(tuple(mean.tolist()), tuple(std.clamp_min(std_floor).tolist()))
