"""The stages of the fast path on a GPU: fused by torch's compiler if asked for, and captured as CUDA graphs,
one launch instead of hundreds.

Written with care and not yet run on a GPU; `make_stage` therefore falls back to calling the stage directly,
with a line in the log, wherever capturing fails.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kuavo_smolvla_ros.policy.backbone_builtin import cache_dir
from kuavo_smolvla_ros.policy.sampler_steps import Steps

logger = logging.getLogger(__name__)

WARM_UPS = 3  # before capturing: libraries choose their kernels and allocate their workspaces

Stage = Callable[..., Any]


class Captured:
    """A function of tensors, recorded once and replayed with others of the same shapes.

    The result is a buffer that the next call overwrites.
    """

    def __init__(self, function: Stage, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result


def make_stage(name: str, function: Stage, inputs: Sequence[Tensor]) -> Stage:
    """The function as a graph, or itself with a line that says why."""
    started = time.monotonic()
    try:
        stage = Captured(function, inputs)
    except RuntimeError as error:
        logger.warning("%s runs without a CUDA graph: %s", name, str(error).splitlines()[0])
        return function
    logger.info("captured %s as a CUDA graph in %.1f s", name, time.monotonic() - started)
    return stage


def compile_steps(steps: Steps) -> None:
    """Let torch's compiler fuse each stage at its first use, and keep what it made across restarts."""
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    logger.info("vision, prefix and denoising step will be compiled at first use; kept in %s", folder)
    for name in ("encode", "prefix", "velocity"):
        setattr(steps, name, torch.compile(getattr(steps, name), dynamic=False))
