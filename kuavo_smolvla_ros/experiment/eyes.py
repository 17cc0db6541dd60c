"""A tiny network that has learnt to see and nothing else: what a pretrained backbone is to the full-size one.

SmolVLM2 comes with eyes that have seen the world. The built-in tiny backbone has random weights, and most of
a short training would go into seeing. So its vision encoder and connector first learn, from pictures of all
scenes, to tell where things and hands are. Its language model, its expert, and every action begin with
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kuavo_smolvla_ros.experiment.gather import ABOUT
from kuavo_smolvla_ros.experiment.seeing import SeeingSettings
from kuavo_smolvla_ros.policy.build import NETWORK_PREFIX, WEIGHTS_FILE
from kuavo_smolvla_ros.policy.checkpoint import (
    CHECKPOINT_FILE,
    atomic_folder,
    read_json,
    write_json,
    write_weights,
)
from kuavo_smolvla_ros.policy.configuration_kuavo_smolvla import KuavoSmolVLAConfig
from kuavo_smolvla_ros.policy.images import prepare_pixels
from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy
from kuavo_smolvla_ros.policy.network import LM_HEAD
from kuavo_smolvla_ros.policy.vision import encode_images

HIDDEN = 256
LEAST_SPREAD_M = 0.005
"""Of a place that hardly changes in the data: what is closer than this need not be told apart."""
LEAST_SPREAD_RAD = 0.05
HELD_OUT = 0.1
"""Share of the episodes that only the errors below are computed from."""
PROBE = 512


@dataclass
class _Scenes:
    """One task's frames: pictures, states, and where things were, in deviations."""

    pictures: Any
    states: Tensor
    places: Tensor
    spread: Tensor
    things: list[str]
    training: NDArray[np.int64]
    held_out: NDArray[np.int64]

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        rows = np.sort(rows)
        pictures = torch.from_numpy(np.array(self.pictures[rows])).permute(0, 1, 4, 2, 3)
        return pictures, self.states[rows], self.places[rows]


class _Seer(nn.Module):
    """From the pictures' tokens and the state to the places of each task's things."""

    def __init__(self, tokens: int, state: int, widths: Sequence[int], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(tokens)
        self.trunk = nn.Sequential(nn.Linear(tokens + state, HIDDEN), nn.GELU())
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, width) for width in widths)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, tokens: Tensor, state: Tensor, task: int) -> Tensor:
        known = torch.cat([self.norm(tokens), (state - self.mean) / self.std], 1)
        return self.heads[task](self.trunk(known))


def learn_to_see(
    folders: Sequence[Path],
    config: KuavoSmolVLAConfig,
    settings: SeeingSettings,
    into: Path,
    progress: Callable[[float], None] = lambda loss: None,
) -> dict[str, Any]:
    """Train the eyes of a new policy on the demonstrations in `folders` and store it in `into`.

    Returns, by task, how many millimetres off it tells each thing in episodes it never saw (root mean
    square).
    `config` says what network; `progress` is called with each step's loss.
    """
    torch.manual_seed(settings.seed)
    scenes = [_scenes(folder) for folder in folders]
    policy = KuavoSmolVLAPolicy(config)
    network = policy.model
    eyes = [p for n, p in network.named_parameters() if "vision_model" in n or ".connector." in n]
    for parameter in eyes:
        parameter.requires_grad_(True)
    states = torch.cat([scene.states for scene in scenes])
    cameras = len(config.cameras)
    tokens = cameras * _tokens(config) * network.architecture.text.width
    seer = _Seer(
        tokens, states.shape[1], [s.places.shape[1] for s in scenes],
        states.mean(0), states.std(0).clamp_min(LEAST_SPREAD_RAD),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [*eyes, *seer.parameters()], lr=settings.lr, weight_decay=settings.weight_decay
    )
    rng = np.random.default_rng(settings.seed)

    def see(pictures: Tensor) -> Tensor:
        pixels = prepare_pixels(list(pictures.unbind(1)), config.image_size)
        return encode_images(network, pixels.flatten(0, 1)).reshape(len(pictures), -1)

    share = max(1, settings.batch // len(scenes))
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _course(step, settings)
        drawn = [scene.batch(rng.choice(scene.training, share)) for scene in scenes]
        seen = see(torch.cat([pictures for pictures, _, _ in drawn])).split(share)
        losses = [
            F.smooth_l1_loss(seer(tokens, state, task), places)
            for task, (tokens, (_, state, places)) in enumerate(zip(seen, drawn, strict=True))
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(eyes, 1.0)
        optimizer.step()
        progress(float(loss.detach()))
    errors = {
        folder.name: _errors(see, seer, scene, task)
        for task, (folder, scene) in enumerate(zip(folders, scenes, strict=True))
    }
    with atomic_folder(into) as fresh:
        _write(policy, fresh)
    return errors


def _write(policy: KuavoSmolVLAPolicy, folder: Path) -> None:
    """Weights to begin a first stage with. Statistics come from the data that stage is trained on."""
    policy.config._save_pretrained(folder)
    weights = policy.model.state_dict()
    write_weights(folder / WEIGHTS_FILE, {NETWORK_PREFIX + n: t for n, t in weights.items() if n != LM_HEAD})
    write_json(folder / CHECKPOINT_FILE, {"robot_fingerprint": None})


def _scenes(folder: Path) -> _Scenes:
    places = torch.from_numpy(np.load(folder / "places.npy"))
    episodes = np.load(folder / "episodes.npy")
    # At least one of several; a single one is all there is to learn from.
    training = episodes < min((1 - HELD_OUT) * (episodes.max() + 1), max(episodes.max(), 1))
    spread = places[training].std(0).clamp_min(LEAST_SPREAD_M)
    return _Scenes(
        np.load(folder / "pictures.npy", mmap_mode="r"),
        torch.from_numpy(np.load(folder / "states.npy")),
        (places - places[training].mean(0)) / spread,
        spread,
        read_json(folder / ABOUT)["things"],
        np.flatnonzero(training),
        np.flatnonzero(~training),
    )


def _tokens(config: KuavoSmolVLAConfig) -> int:
    assert config.architecture is not None
    return config.architecture.image_tokens(*reversed(config.image_size))


def _course(step: int, settings: SeeingSettings) -> float:
    """Up in a straight line, down in a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return min(1.0, (step + 1) / settings.warmup) * (0.02 + 0.98 * cosine)


@torch.no_grad()
def _errors(see: Callable[[Tensor], Tensor], seer: _Seer, scene: _Scenes, task: int) -> dict[str, float]:
    """Nothing where no episode was held out."""
    if not len(scene.held_out):
        return {}
    rows = np.random.default_rng(0).choice(scene.held_out, min(PROBE, len(scene.held_out)), replace=False)
    pictures, state, places = scene.batch(rows)
    squares = ((seer(see(pictures), state, task) - places) * scene.spread).square().mean(0)
    return {
        thing: round(1000 * float(squares[3 * i : 3 * i + 3].sum().sqrt()), 1)
        for i, thing in enumerate(scene.things)
    }


def base_config(folder: Path) -> KuavoSmolVLAConfig:
    """The tiny network for demonstrations such as those in `folder`."""
    told = read_json(folder / ABOUT)
    wanted = told["wanted"]
    config = KuavoSmolVLAConfig(backbone="tiny", device="cpu", compute_dtype="float32")
    size = (wanted["height"], wanted["width"])
    config.set_features(
        np.load(folder / "states.npy", mmap_mode="r").shape[1],
        len(told["action_names"]),
        dict.fromkeys(told["cameras"], size),
    )
    return config
