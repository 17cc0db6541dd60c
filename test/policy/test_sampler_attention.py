import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kuavo_smolvla_ros.policy.sampler_attention import attend_grouped


def with_every_head_its_own_keys(queries, keys, values, mask):
    groups, length = queries.shape[2] // keys.shape[1], queries.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    own = None if mask is None else mask[:, :, :length]  # the same for each of a group
    out = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=own, scale=1.0)
    return out.transpose(1, 2).flatten(2)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    keys=st.integers(1, 40),
    masks=st.sampled_from(["none", "one", "own"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_queries_of_a_group_share_keys(batch, length, heads, groups, keys, masks, seed):
    torch.manual_seed(seed)
    queries = torch.randn(batch, length, heads * groups, 8)
    k, v = torch.randn(2, batch, keys, heads, 8).transpose(2, 3)  # as they come from a projection
    mask = None
    if masks != "none":
        hidden = torch.rand(batch if masks == "own" else 1, 1, length, keys) < 0.5
        hidden[..., 0] = False
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).repeat(1, 1, groups, 1)
    expected = with_every_head_its_own_keys(queries, k, v, mask)
    assert torch.allclose(attend_grouped(queries, k, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_hidden_does_not_count(dtype):
    queries, keys, values = (torch.randn(1, 4, 2, 8).to(dtype) for _ in range(3))
    keys, values = keys.transpose(1, 2), values.transpose(1, 2).clone()
    mask = torch.zeros(1, 1, 4, 4, dtype=dtype)
    mask[..., -1] = float("-inf")
    before = attend_grouped(queries, keys, values, mask)
    values[:, :, -1] = 100.0
    assert torch.equal(attend_grouped(queries, keys, values, mask), before)
    assert not torch.allclose(attend_grouped(queries, keys, values, None), before)
