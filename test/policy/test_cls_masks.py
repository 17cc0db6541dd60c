"""The table of who sees whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kuavo_smolvla_ros.errors import UsageError
from kuavo_smolvla_ros.policy.cls_masks import make_att_2d_masks_with_cls


def table(pads, blocks, *args):
    pad = torch.tensor([[c == "x" for c in pads]])
    att = torch.tensor([[int(c) if c.isdigit() else 0 for c in blocks]])
    mask = make_att_2d_masks_with_cls(pad, att, *args)
    assert mask.dtype == torch.bool
    return ["".join("x" if seen else "." for seen in row) for row in mask[0].tolist()]


def test_table():
    """P: prefix CLS, I: picture, L: language (the second one padding), S: state, A: action, C: suffix CLS."""
    #       PPIILLSAAACC
    pads = "xxxxx.xxxxxx"
    blocks = "cc00001111cc"
    assert table(pads, blocks, 2, 2, 2) == [
        "xxxxx.......",  # P: each other, pictures and language
        "xxxxx.......",
        "..xxx.......",  # I: as without CLS tokens
        "..xxx.......",
        "..xxx.......",  # L
        "............",  # L, padding
        "..xxx.x.....",  # S: also itself
        "..xxx.xx....",  # A: causal
        "..xxx.xxx...",
        "..xxx.xxxx..",
        "........xxxx",  # C: the last two actions, each other
        "........xxxx",
    ]


def test_actions_in_one_block_see_each_other():
    assert table("xxxxx", "0010c", 0, 1, 1) == ["xx...", "xx...", "xxxx.", "xxxx.", "...xx"]


def test_a_context_longer_than_the_real_tokens_stops_at_padding():
    assert table("x.xx", "000c", 0, 1, 3)[3] == "x.xx"


def test_without_cls_it_is_the_usual_rule():
    from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks

    pad = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    att = (torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) > 0.5).long()
    assert torch.equal(make_att_2d_masks_with_cls(pad, att, 0, 0), make_att_2d_masks(pad, att))


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 8), st.integers(0, 2**31))
def test_ordinary_tokens_see_what_they_see_without(before, behind, ordinary, seed):
    random = torch.Generator().manual_seed(seed)
    length = before + ordinary + behind
    pad = torch.rand(2, length, generator=random) > 0.2
    att = (torch.rand(2, length, generator=random) > 0.5).long()
    mask = make_att_2d_masks_with_cls(pad, att, before, behind, ordinary)
    own = slice(before, before + ordinary)
    assert torch.equal(mask[:, own, own], make_att_2d_masks_with_cls(pad[:, own], att[:, own], 0, 0))
    assert not mask[:, own, :before].any()
    assert not mask[:, own, before + ordinary :].any()
    assert not mask[:, :before, before + ordinary :].any()
    assert not mask[:, before + ordinary :, :before].any()


@pytest.mark.parametrize(
    ("shape", "args", "complaint"),
    [
        ((1, 4), (2, 2, 1), "do not leave an ordinary one"),
        ((1, 4), (-1, 0, 1), "do not leave"),
        ((1, 6), (1, 1, 5), "1 to 4"),
        ((1, 6), (1, 1, 0), "1 to 4"),
        ((6,), (1, 1, 1), "alike"),
    ],
)
def test_what_makes_no_sense_is_refused(shape, args, complaint):
    pad = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(UsageError, match=complaint):
        make_att_2d_masks_with_cls(pad, torch.zeros(shape, dtype=torch.long), *args)


def test_masks_of_another_kind_are_refused():
    with pytest.raises(UsageError, match="boolean"):
        make_att_2d_masks_with_cls(torch.ones(1, 6), torch.zeros(1, 6), 1, 1, 1)
