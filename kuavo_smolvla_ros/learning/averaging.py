"""The weights a stage results in: as trained, averaged over steps, or drawn back towards its start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from kuavo_smolvla_ros.learning.sharding import like


class ResultWeights:
    """Keeps the running average and the start of the trained weights, as far as they are asked for.

    `decay`: the average moves by 1 - decay in each step. `previous_share`: this much of the start is in the
    result. Training itself goes on with the weights as trained.
    """

    def __init__(
        self, trained: Mapping[str, Tensor], decay: float | None, previous_share: float | None
    ) -> None:
        self._trained = dict(trained)
        self._decay = decay
        self._share = previous_share or 0.0
        self.average = self._copy() if decay is not None else None
        self._start: dict[str, Tensor] | None = None

    def start_from(self, start: Mapping[str, Tensor]) -> None:
        """What `previous_share` refers to: the weights this stage was initialised with.

        A trained parameter that is not among them stays as trained.
        """
        if self._share:
            self._start = {
                name: like(parameter, start[name].to(parameter.device, copy=True))
                for name, parameter in self._trained.items()
                if name in start
            }

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each optimizer step."""
        if self.average is None:
            return
        assert self._decay is not None
        torch._foreach_lerp_(list(self.average.values()), list(self._trained.values()), 1 - self._decay)

    @torch.no_grad()
    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Continue a stored average."""
        assert self.average is not None
        for name, kept in self.average.items():
            kept.copy_(like(kept, average[name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While the block runs, the network holds the result instead of the weights being trained."""
        if self.average is None and self._start is None:
            yield
            return
        kept = self._copy()
        try:
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    if self.average is not None:
                        parameter.copy_(self.average[name])
                    if self._start is not None and name in self._start:
                        parameter.lerp_(self._start[name], self._share)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._trained.items():
                    parameter.copy_(kept[name])

    @torch.no_grad()
    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._trained.items()}
