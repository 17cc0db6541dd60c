"""The settings of the delta expert, checked where they are written down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuavo_smolvla_ros.errors import UserError

TARGETS = ("base", "demonstration")


class DeltaError(UserError):
    """Settings of the delta expert contradict themselves, or something is asked of one that is not there."""


@dataclass(frozen=True)
class DeltaSettings:
    """What `KuavoSmolVLAConfig` says about the delta expert, under the same names."""

    train_delta_expert: bool
    use_cls_head: bool
    num_cls_prefix: int
    num_cls_suffix: int
    num_action_context: int
    vicreg_weight: float
    vicreg_lambda: float
    vicreg_mu: float
    vicreg_nu: float
    cls_noise_scale: float
    delta_target: str
    delta_refine_steps: int
    delta_max_age: int
    delta_num_layers: int
    delta_width_multiplier: float
    cls_expander_width: int
    chunk_size: int

    def __post_init__(self) -> None:
        for name in ("train_delta_expert", "use_cls_head"):
            if not isinstance(getattr(self, name), bool):
                raise DeltaError(f"{name} is {getattr(self, name)!r}; it is true or false")
        for name in ("num_cls_prefix", "num_cls_suffix", "delta_num_layers", "cls_expander_width"):
            self._whole(name, 1)
        for name in ("delta_refine_steps", "delta_max_age"):
            self._whole(name, 0)
        self._whole("num_action_context", 1)
        for name in ("vicreg_weight", "vicreg_lambda", "vicreg_mu", "vicreg_nu", "cls_noise_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DeltaError(f"{name} is {value}; it must be finite and not negative")
        if not (math.isfinite(self.delta_width_multiplier) and self.delta_width_multiplier > 0):
            raise DeltaError(f"delta_width_multiplier is {self.delta_width_multiplier}; it must be positive")
        if self.delta_target not in TARGETS:
            raise DeltaError(f"delta_target is {self.delta_target!r}; it is one of {', '.join(TARGETS)}")
        if self.train_delta_expert and self.num_action_context > self.chunk_size:
            raise DeltaError(
                f"num_action_context is {self.num_action_context}, but a chunk has {self.chunk_size} actions"
            )
        if self.delta_max_age >= self.chunk_size:
            raise DeltaError(
                f"delta_max_age is {self.delta_max_age}; a chunk of {self.chunk_size} actions is over by then"
            )
        if not self.train_delta_expert:
            for name in ("use_cls_head", "delta_refine_steps", "delta_max_age"):
                if getattr(self, name):
                    raise DeltaError(
                        f"{name} is {getattr(self, name)}, but there is no delta expert: set "
                        f"train_delta_expert to true, or {name} to {'false' if name[0] == 'u' else 0}"
                    )
        elif self.delta_target == "base" and self.cls_noise_scale == 0:
            raise DeltaError(
                "cls_noise_scale is 0 and delta_target is base: there is nothing to undo, hence nothing to "
                "learn; set cls_noise_scale to 0.01, or delta_target to demonstration"
            )

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DeltaError(f"{name} is {value!r}; it is a whole number of at least {least}")


# What turns a policy with a delta expert into one without: overrides of its configuration.
EXTRAS_OFF = {
    "train_delta_expert": False,
    "use_cls_head": False,
    "delta_refine_steps": 0,
    "delta_max_age": 0,
}
