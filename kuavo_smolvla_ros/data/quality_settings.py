"""Thresholds of the quality report; `config/data/quality.yaml`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.paths import config_dir


@dataclass(frozen=True)
class QualitySettings:
    """Where a figure becomes a finding; None: never. The file explains each."""

    static_range: float | None
    fast_share: float | None
    jerky_share: float | None
    outside_limits_share: float | None
    at_limit_share: float | None
    lag_s: float | None
    lead_s: float | None
    gripper_range: float | None
    frozen_share: float | None
    dark_level: float | None
    duplicate_distance: float | None
    shift: float | None
    episodes_per_task: float | None
    bad_share: float
    left_out_share: float

    @classmethod
    def load(cls, path: Path | None = None) -> QualitySettings:
        """The shipped thresholds, or those of a file of one's own, which may name only what differs."""
        given = _read(config_dir() / "data" / "quality.yaml")
        if path is not None:
            if not path.is_file():
                raise UsageError(f"{path}: there is no such file")
            given |= _read(path)
        return cls.from_mapping(given)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> QualitySettings:
        known = [f.name for f in fields(cls)]
        for key, value in given.items():
            if key not in known:
                raise UsageError(f"the threshold '{key}' is unknown; known are {', '.join(known)}")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value >= 0) and not (
                value is None and key not in ("bad_share", "left_out_share")
            ):
                raise UsageError(f"the threshold '{key}' is {value!r}; it must be a number of 0 or more")
        missing = [name for name in known if name not in given]
        if missing:
            raise UsageError(f"the threshold '{missing[0]}' is missing")
        return cls(**given)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: is no YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("fail", {}), dict):
        raise UsageError(f"{path}: holds no thresholds (key: value)")
    rest = {key: value for key, value in content.items() if key != "fail"}
    return rest | content.get("fail", {})
