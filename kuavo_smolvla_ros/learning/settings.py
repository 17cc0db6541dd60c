"""How and where a run takes place: everything that changes nothing in its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kuavo_smolvla_ros.errors import UsageError

FEATURE_CACHE = ("auto", "deep", "off")


@dataclass(frozen=True)
class RunSettings:
    """The section `run` of the configuration; sizes in the names' units, None: decided at the start."""

    output_root: str
    batch_size: int  # per device
    num_workers: int  # per device
    prefetch_factor: int
    device: str | None
    robot: str | None  # of config/robot, for data sets that do not say which robot they are from
    compile: bool
    feature_cache: str  # auto, deep or off
    shard: bool  # trained weights, gradients and moments divided among the devices (FSDP)
    log_freq_steps: int
    save_freq_epochs: int
    save_freq_steps: int
    keep_last: int
    min_free_gib: float
    tensorboard: bool
    wandb: bool
    push_to_hub: str | None

    def __post_init__(self) -> None:
        if self.feature_cache not in FEATURE_CACHE:
            raise UsageError(
                f"run.feature_cache is {self.feature_cache!r}; it is one of {', '.join(FEATURE_CACHE)}"
            )
        for name in (
            "batch_size",
            "prefetch_factor",
            "log_freq_steps",
            "save_freq_epochs",
            "save_freq_steps",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"run.{name} is {getattr(self, name)}; it is at least 1")
        for name in ("num_workers", "keep_last", "min_free_gib"):
            if getattr(self, name) < 0:
                raise UsageError(f"run.{name} is {getattr(self, name)}; it is at least 0")

    @property
    def root(self) -> Path:
        return Path(self.output_root).expanduser()
