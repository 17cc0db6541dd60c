"""The delta expert as part of a policy: its loss, and chunks refined when they are made or later.

A batch may bring what the frozen base says of its samples (`BASE_CHUNKS`, `IMAGE_TOKENS`), so that training
need not run it, and the states of the steps that followed (`LATER_STATES`), so that refining an older chunk
from a newer state is trained as well.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.delta_expert import displacement, observe, read_context, refine
from kuavo_smolvla_ros.policy.delta_network import DeltaNetwork
from kuavo_smolvla_ros.policy.delta_settings import DeltaError
from kuavo_smolvla_ros.policy.dimensions import ACTION, pad_last
from kuavo_smolvla_ros.policy.expert import velocity
from kuavo_smolvla_ros.policy.flow import TIME_EXPONENT, TIME_FLOOR, euler, sample_noise
from kuavo_smolvla_ros.policy.loss import first_values, masked_mean
from kuavo_smolvla_ros.policy.prefix import KeyValues
from kuavo_smolvla_ros.policy.vicreg import VICRegTerms, gather_samples, vicreg_terms

if TYPE_CHECKING:
    from kuavo_smolvla_ros.policy.modeling_kuavo_smolvla import KuavoSmolVLAPolicy

logger = logging.getLogger(__name__)

BASE_CHUNKS = "delta.base_chunks"  # (B, draws, C, padded width), normalised: several, each from other noise
IMAGE_TOKENS = "delta.image_tokens"  # (B, T, width)
LATER_STATES = "delta.later_states"  # (B, ages, width), normalised: the state 0, 1, 2 ... steps later
KNOWN_AGES = "delta.known_ages"  # (B,): how many of them there are before the episode ends
SMALL_BATCH = 32  # below it the statistics of VICReg are mostly chance


class Refinable(NamedTuple):
    """What is kept of the last chunk, to refine the rest of it without the pictures."""

    context: KeyValues  # of the layers that the delta expert reads
    chunk: Tensor  # (B, C, padded width), the base's
    movable: Tensor  # (B, C, padded width)


def delta_forward(
    policy: KuavoSmolVLAPolicy,
    batch: Mapping[str, Any],
    noise: Tensor | None,
    time: Tensor | None,
    reduction: str,
    counted: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The denoising loss, and in training with a CLS head the VICReg loss; numbers to log.

    `noise` is what is added to the base's chunk (before its scale); `time`, of the flow's distribution,
    chooses the refinement step, the chunk's age and the base's draw.
    """
    config, settings, network = policy.config, policy.config.delta, delta_network(policy)
    actions, valid = policy._targets(batch)
    size, device = actions.shape[0], actions.device
    noise = sample_noise(tuple(actions.shape), device) if noise is None else noise
    chance = torch.rand(size, device=device) if time is None else _uniform(time)
    later = batch.get(LATER_STATES)
    with torch.no_grad(), policy._precision(device):
        context = policy.context(batch)
        chunks = _base_chunks(policy, batch, context)
    ages = 1 if later is None else settings.delta_max_age + 1
    chance, which = _digit(chance, chunks.shape[1])
    chance, age = _digit(chance, ages)
    _, step = _digit(chance, max(settings.delta_refine_steps, 1))
    moment = 1.0 - step.to(torch.float32) / max(settings.delta_refine_steps, 1)
    rows = torch.arange(size, device=device)
    if later is None:
        state = policy._state(batch)
    else:
        age = torch.minimum(age, batch[KNOWN_AGES] - 1)
        state = pad_last(later[rows, age].to(torch.float32), config.max_state_dim)
    base = chunks[rows, which]
    # Past the episode's end nothing was demonstrated: the chunk stays what it is there, without a loss.
    goal = base if settings.delta_target == "base" else torch.where(valid, actions, base)
    # Refinements after the first begin on the way from the base's chunk to the goal.
    on_the_way = goal + moment[:, None, None] * (base - goal)
    in_episode = ~policy._entry(batch, "action_is_pad")[:, :, None]
    real = valid.any(1, keepdim=True)
    noisy = on_the_way + settings.cls_noise_scale * noise * real
    valid = valid & (torch.arange(actions.shape[1], device=device) >= age[:, None])[:, :, None]
    with_cls = settings.use_cls_head and policy.training
    with policy._precision(device):
        looked = displacement(
            network,
            read_context(network, context),
            noisy,
            moment,
            state,
            age,
            settings.num_action_context if with_cls else None,
        )
        seen = observe(network, context) if with_cls else None
    errors = (looked.value - (goal - noisy)).square()
    loss = masked_mean(errors, first_values(valid, counted), reduction)
    log = _loss_log(errors, in_episode, loss)
    if seen is not None and looked.cls is not None:
        terms, cosine = _vicreg(policy, network, seen, looked.cls)
        loss = loss + settings.vicreg_weight * terms.weighted(
            settings.vicreg_lambda, settings.vicreg_mu, settings.vicreg_nu
        )
        log |= {f"vicreg_{name}": term.detach() for name, term in terms._asdict().items()}
        log["cls_cosine"] = cosine
    log["delta_loss"] = log["loss"] = loss.detach().mean()
    return loss, log


def base_chunk(
    policy: KuavoSmolVLAPolicy, batch: Mapping[str, Any], context: KeyValues, noise: Tensor
) -> Tensor:
    """The base's chunk (B, C, padded width) as at run time; zero in the dimensions a robot does not have."""
    config = policy.config
    free = policy._free_dimensions(batch, noise.device)
    cache = policy.expert_cache(policy.prefill(batch, context))
    chunk = euler(
        lambda x, time: velocity(policy.model, cache, x, time),
        noise,
        config.num_steps,
        free=free if config.pin_padding else None,
    )
    return torch.where(free, chunk, 0.0)


@torch.no_grad()
def refined(
    policy: KuavoSmolVLAPolicy,
    batch: Mapping[str, Any],
    context: KeyValues,
    chunk: Tensor,
    held: int = 0,
) -> Tensor:
    """A chunk (B, C, padded width) just made, refined; its first `held` steps are being executed and stay.

    Keeps what is needed to refine the rest of it later.
    """
    network = delta_network(policy)
    free = policy._free_dimensions(batch, chunk.device)
    steps = torch.arange(chunk.shape[1], device=chunk.device)
    movable = free & (steps >= held)[None, :, None]
    chunk = torch.where(free, chunk, 0.0)
    kept = Refinable(read_context(network, context), chunk, movable.expand_as(chunk))
    policy.refinable = kept
    age = torch.zeros(len(chunk), dtype=torch.long, device=chunk.device)
    return refine(
        network, kept.context, chunk, policy._state(batch), age, policy.config.delta_refine_steps, movable
    )


@torch.no_grad()
def refine_rest(policy: KuavoSmolVLAPolicy, state: Tensor, age: int) -> Tensor:
    """The last chunk, refined anew from a state (B, width), normalised, `age` steps after the chunk's own.

    Returns the whole chunk (B, C, width); its first `age` steps are the base's, they are over. Neither
    pictures nor language are looked at again.
    """
    config, kept = policy.config, policy.refinable
    if kept is None:
        raise DeltaError(
            "there is no chunk to refine: delta_refine_steps must be 1 or more, and a chunk have been made "
            "since the last reset()"
        )
    if not 0 <= age <= config.delta_max_age:
        raise DeltaError(
            f"the chunk is {age} steps old; refining was trained up to delta_max_age = "
            f"{config.delta_max_age}. Make a new chunk"
        )
    if state.shape != (len(kept.chunk), state.shape[-1]):
        raise UsageError(f"the state is {tuple(state.shape)}, the chunk is for {len(kept.chunk)} robots")
    ages = torch.full((len(kept.chunk),), age, device=kept.chunk.device)
    steps = torch.arange(kept.chunk.shape[1], device=kept.chunk.device)
    padded = pad_last(state.to(kept.chunk.device, torch.float32), config.max_state_dim)
    with policy._precision(kept.chunk.device):
        chunk = refine(
            delta_network(policy),
            kept.context,
            kept.chunk,
            padded,
            ages,
            config.delta_refine_steps,
            kept.movable & (steps >= age)[None, :, None],
        )
    return chunk[..., : config.widths[ACTION]]


def delta_network(policy: KuavoSmolVLAPolicy) -> DeltaNetwork:
    """The policy's network, which has a delta expert, or an error that says it has none."""
    if not isinstance(policy.model, DeltaNetwork):
        raise DeltaError("the policy has no delta expert: set train_delta_expert to true")
    return policy.model


def cls_tokens(policy: KuavoSmolVLAPolicy, batch: Mapping[str, Any], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix CLS tokens (B, n, text width) and suffix CLS tokens (B, m, width) of samples, for analysis."""
    settings, network = policy.config.delta, delta_network(policy)
    if not settings.use_cls_head:
        raise DeltaError("the policy has no CLS head: it was trained with use_cls_head = false")
    with policy._precision(noise.device):
        context = policy.context(batch)
        chunk = base_chunk(policy, batch, context, noise)
        moment = torch.ones(len(chunk), device=chunk.device)
        age = torch.zeros(len(chunk), dtype=torch.long, device=chunk.device)
        looked = displacement(
            network,
            read_context(network, context),
            chunk,
            moment,
            policy._state(batch),
            age,
            settings.num_action_context,
        )
        assert looked.cls is not None
        return observe(network, context), looked.cls


def project_cls(network: DeltaNetwork, seen: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds of CLS tokens to the two views (B, expander width) that VICReg compares."""
    with torch.autocast(seen.device.type, enabled=False):
        return (
            network.obs_cls_proj(seen.flatten(1).to(torch.float32)),
            network.act_cls_proj(done.flatten(1).to(torch.float32)),
        )


def _base_chunks(policy: KuavoSmolVLAPolicy, batch: Mapping[str, Any], context: KeyValues) -> Tensor:
    if BASE_CHUNKS in batch:
        return batch[BASE_CHUNKS].to(torch.float32)
    size, device = context.valid.shape[0], context.valid.device
    shape = (size, policy.config.chunk_size, policy.config.max_action_dim)
    return base_chunk(policy, batch, context, sample_noise(shape, device))[:, None]


def _vicreg(
    policy: KuavoSmolVLAPolicy, network: DeltaNetwork, seen: Tensor, done: Tensor
) -> tuple[VICRegTerms, Tensor]:
    views = project_cls(network, seen, done)
    terms = vicreg_terms(*views)
    if not policy.warned_of_small_batch:
        policy.warned_of_small_batch = True
        samples, width = gather_samples(views[0].detach()).shape
        if samples < SMALL_BATCH:
            logger.warning(
                "VICReg sees %d samples at a time; below %d its statistics are mostly chance. Raise the "
                "batch size (gradient accumulation does not help)",
                samples,
                SMALL_BATCH,
            )
        if width > 2 * samples:
            logger.warning(
                "cls_expander_width is %d for %d samples at a time: above twice as many, most of the "
                "covariance term is its floor. Set it to %d or less",
                width,
                samples,
                2 * samples,
            )
    cosine = torch.nn.functional.cosine_similarity(views[0].detach(), views[1].detach()).mean()
    return terms, cosine


def _loss_log(errors: Tensor, in_episode: Tensor, loss: Tensor) -> dict[str, Tensor]:
    errors = errors.detach()
    inside = torch.where(in_episode, errors, 0.0)
    count = in_episode.sum().clamp_min(1) * errors.shape[-1]
    return {
        "delta_losses_after_forward": errors.mean(),
        "delta_losses_after_in_ep_bound": inside.sum() / count,
        "delta_losses_after_rm_padding": loss.detach().mean(),
    }


def _uniform(time: Tensor) -> Tensor:
    """Numbers evenly spread over 0..1 from times of the flow's distribution (the inverse of how it is made).

    So everything random in a step remains a function of what the trainer hands over.
    """
    return ((time - TIME_FLOOR) / (1.0 - TIME_FLOOR)).clamp(0.0, 1.0) ** (1.0 / TIME_EXPONENT)


def _digit(chance: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """One of `base` whole numbers from an even chance, and the chance that is left for the next."""
    scaled = (chance * base).clamp(0.0, base - 1e-6)
    digit = scaled.to(torch.long).clamp_max(base - 1)
    return scaled - digit, digit
