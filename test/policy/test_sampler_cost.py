"""The counted cost of a chunk is what the network does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kuavo_smolvla_ros.policy.architecture import read_architecture
from kuavo_smolvla_ros.policy.backbone import resolve_backbone
from kuavo_smolvla_ros.policy.expert import prepare_expert, velocity
from kuavo_smolvla_ros.policy.prefix import append_state, context_embeddings, embed_images, run_context
from kuavo_smolvla_ros.policy.sampler_cost import encode_cost, prefix_cost, step_cost


def counted(function):
    """What torch counts; its fused attention on CPUs is not among it, hence the plain kernel."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def test_equals_what_torch_counts(make_policy, make_batch):
    policy = make_policy()
    network, batch = policy.model, make_batch(policy, 1)
    sizes, pixels = network.architecture, batch["observation.pixels"]
    flops, images = counted(lambda: embed_images(network, pixels))
    assert flops == 2 * encode_cost(sizes, 64, 64).flops
    tokens, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    state = torch.zeros(1, 32)

    def prefill():
        context = run_context(network, *context_embeddings(network, images, tokens, mask))
        return prepare_expert(network, append_state(network, context, state), 50)

    length = images.shape[1] + tokens.shape[1] + 1
    flops, cache = counted(prefill)
    # torch counts the state's own projection too; the context there does not see the state.
    assert flops == pytest.approx(prefix_cost(sizes, length).flops, rel=0.03)
    flops, _ = counted(lambda: velocity(network, cache, torch.zeros(1, 50, 32), torch.ones(1)))
    head = 2 * 50 * sizes.expert_width * (2 * sizes.expert_width)  # which the fast path has folded away
    assert flops == step_cost(sizes, length, 50, 32).flops + head


def test_the_full_size_costs_what_is_known_of_it():
    folder = resolve_backbone("smolvlm2-500m", weights=False).path
    sizes = read_architecture(
        folder, num_vlm_layers=16, expert_width_multiplier=0.75, self_attn_every_n_layers=2
    )
    assert encode_cost(sizes, 512, 512).flops == pytest.approx(215.3e9, rel=0.005)
    assert step_cost(sizes, 241, 50, 32).flops == pytest.approx(10.6e9, rel=0.02)
    assert step_cost(sizes, 241, 50, 32).weights == pytest.approx(98e6, rel=0.05)
