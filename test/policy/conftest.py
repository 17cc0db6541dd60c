"""A tiny policy, batches for it, and lerobot's own SmolVLA with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.dimensions import Statistics
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.processor_kuavo_smolvla import make_kuavo_smolvla_pre_post_processors

CAMERAS = {"head_cam_h": (48, 64), "wrist_cam_l": (48, 64)}
SENTENCES = ["pick up the parcel", "go", "put the bottle down with the label facing up"]


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_config() -> Callable[..., KuavoSmolVLAConfig]:
    def make(
        state_dim: int = 16,
        action_dim: int = 16,
        cameras: dict[str, tuple[int, int]] | None = None,
        **fields: Any,
    ) -> KuavoSmolVLAConfig:
        config = KuavoSmolVLAConfig(**{"backbone": "tiny", "device": "cpu", **fields})
        config.set_features(state_dim, action_dim, CAMERAS if cameras is None else cameras)
        return config

    return make


@pytest.fixture
def make_policy(make_config: Callable[..., KuavoSmolVLAConfig]) -> Callable[..., KuavoSmolVLAPolicy]:
    def make(*args: Any, **fields: Any) -> KuavoSmolVLAPolicy:
        config = make_config(*args, **fields)
        return KuavoSmolVLAPolicy(config, statistics=Statistics.identity(config.widths)).eval()

    return make


@pytest.fixture
def make_raw() -> Callable[..., dict[str, Any]]:
    """A batch as a data loader gives it."""

    def make(batch: int = 3, state_dim: int = 16, action_dim: int = 16, seed: int = 0) -> dict[str, Any]:
        random = torch.Generator().manual_seed(seed)
        return {
            "observation.state": torch.randn(batch, state_dim, generator=random),
            "action": torch.randn(batch, 50, action_dim, generator=random),
            "action_is_pad": torch.zeros(batch, 50, dtype=torch.bool),
            "task": [SENTENCES[i % len(SENTENCES)] for i in range(batch)],
            **{
                f"observation.images.{name}": torch.rand(batch, 3, *size, generator=random)
                for name, size in CAMERAS.items()
            },
        }

    return make


@pytest.fixture
def make_batch(make_raw: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same after a policy's preprocessor."""

    def make(policy: KuavoSmolVLAPolicy, *args: Any, **kwargs: Any) -> dict[str, Any]:
        before, _ = make_kuavo_smolvla_pre_post_processors(policy.config, statistics=policy.statistics)
        widths = policy.config.widths
        return before(
            make_raw(
                *args,
                **{"state_dim": widths["observation.state"], "action_dim": widths["action"], **kwargs},
            )
        )

    return make
