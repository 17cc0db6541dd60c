"""Attention for the fast path; attention's scale is already in the queries.

torch's fused kernel for CPUs multiplies with a BLAS that does not use the vector width of processors of
other makers than its own. oneDNN does: scores of one head at a time, small enough to stay in the cache, are
then twice as fast on one thread. On several, torch divides the heads among them, while these small products
make all threads wait for each other hundreds of times: no gain on an idle machine, and up to ten times the
time on a busy one. Scores are in single precision in both cases, whatever the precision around them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**19  # of one product: 2 MB
WORTH_IT = 2**18  # below it the calls cost more than they save


def attend_patches(queries: Tensor, keys: Tensor, values: Tensor, *, onednn: bool) -> Tensor:
    """Every patch over every patch: (N, L, H, D) each -> (N, L, H * D)."""
    if onednn and queries.shape[1] ** 2 >= WORTH_IT and torch.get_num_threads() == 1:
        return _attend_by_head(queries, keys, values).flatten(2)
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, scale=1.0).transpose(1, 2).flatten(2)


def _attend_by_head(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    rows = max(1, SCORES // keys.shape[1])
    columns = keys.to(torch.float32).permute(0, 2, 3, 1).contiguous()
    values = values.transpose(1, 2).contiguous()
    queries = queries.to(torch.float32).transpose(1, 2).contiguous()
    product = torch.ops.mkldnn._linear_pointwise
    for image in range(queries.shape[0]):
        for head in range(queries.shape[1]):
            # Everything stands row by row: on loose strides oneDNN is a thousand times slower.
            key, value = columns[image, head].t(), values[image, head].t()
            for first in range(0, queries.shape[2], rows):
                some = slice(first, first + rows)
                scores = product(queries[image, head, some], key, None, "none", [], "")
                weights = torch.softmax(scores, -1).to(values.dtype)
                out[image, some, head] = product(weights, value, None, "none", [], "")
    return out


def attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, H, D) over (B, K, S, D), H a multiple of K, mask (B or 1, 1, H/K * L, S) -> (B, L, H * D)."""
    groups, length = queries.shape[2] // keys.shape[1], queries.shape[1]
    folded = queries.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if queries.dtype == torch.float32 and queries.device.type == "cpu":
        out = _attend_by_products(folded, keys, values, mask)
    else:
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=1.0)
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """For few queries: the fused kernel divides them into products too small to be quick."""
    shape, heads = queries.shape, keys.shape[1]
    queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))
    if mask is None:
        scores = torch.bmm(queries, keys.transpose(1, 2))
    else:
        seen = mask.expand(-1, heads, -1, -1) if len(mask) > 1 else mask
        scores = torch.baddbmm(seen.flatten(0, 1), queries, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), values).view(shape)
