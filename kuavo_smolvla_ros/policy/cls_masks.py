"""Who may look at whom, when learned CLS tokens stand before the prefix and behind the actions.

    [ prefix CLS | pictures, language, state ... actions | suffix CLS ]

The CLS tokens only read. No other token sees them, so what is computed for the others is the same with and
without them; and they take no positions, so the others keep theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kuavo_smolvla_ros.errors import UsageError


def make_att_2d_masks_with_cls(
    pad_masks: Tensor,
    att_masks: Tensor,
    num_cls_prefix: int = 2,
    num_cls_suffix: int = 2,
    num_action_context: int = 5,
) -> Tensor:
    """(B, N) masks of one sequence, CLS tokens included, to (B, N, N): row i may look at column j.

    `pad_masks` is True for real tokens. `att_masks` is 1 where a block of tokens begins that those before it
    do not see: ordinary tokens see their own block and all earlier ones. What stands there for CLS tokens
    does not matter, their rule is fixed:

    * a prefix CLS token sees the prefix CLS tokens and the first block (pictures and language);
    * a suffix CLS token sees the suffix CLS tokens and the last `num_action_context` ordinary tokens;
    * nothing else sees a CLS token, and nothing sees padding or looks from it.
    """
    if pad_masks.ndim != 2 or pad_masks.shape != att_masks.shape:
        raise UsageError(
            f"the two masks are (batch, tokens) alike, they are {tuple(pad_masks.shape)} and "
            f"{tuple(att_masks.shape)}"
        )
    if pad_masks.dtype != torch.bool:
        raise UsageError(f"pad_masks is {pad_masks.dtype}; it is boolean, True for real tokens")
    length = pad_masks.shape[1]
    ordinary = length - num_cls_prefix - num_cls_suffix
    if num_cls_prefix < 0 or num_cls_suffix < 0 or ordinary < 1:
        raise UsageError(
            f"{num_cls_prefix} + {num_cls_suffix} CLS tokens do not leave an ordinary one among {length}"
        )
    if num_cls_suffix and not 1 <= num_action_context <= ordinary:
        raise UsageError(
            f"num_action_context is {num_action_context}; suffix CLS tokens look at 1 to {ordinary} tokens "
            "before them"
        )
    first, last = num_cls_prefix, num_cls_prefix + ordinary
    block = att_masks[:, first:last].to(torch.long).cumsum(1)
    # The first token begins the first block whether or not that is written there.
    block = block - block[:, :1]
    allowed = torch.zeros(len(pad_masks), length, length, dtype=torch.bool, device=pad_masks.device)
    allowed[:, first:last, first:last] = block[:, None, :] <= block[:, :, None]
    allowed[:, :first, :first] = True
    allowed[:, :first, first:last] = (block == 0)[:, None, :]
    allowed[:, last:, last:] = True
    allowed[:, last:, last - num_action_context : last] = True
    return allowed & pad_masks[:, None, :] & pad_masks[:, :, None]
