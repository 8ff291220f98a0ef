"""Attention of packed rows: what the mask says, and the same values without the work that it forbids."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from strategies.packing.attention import Blocks, packed_attention
from strategies.packing.layout import Segment

CPU = torch.device("cpu")
ROWS = {
    "one pair": (Segment(3, 2, 4),),
    "three pairs": (Segment(3, 2, 4), Segment(1, 5, 1), Segment(6, 1, 2)),
    "no prompt": (Segment(0, 3, 2), Segment(2, 2, 2)),
    "empty completions": (Segment(4, 0, 3), Segment(2, 2, 0), Segment(3, 0, 0), Segment(0, 0, 2)),
    "padding": (Segment(2, 3, 3), Segment(5, 0, 0)),
}


def brute_force(segments: tuple[Segment, ...]) -> torch.Tensor:
    """Token by token: a completion's tokens see their prompt and themselves, a prompt's the prompt; nobody looks ahead."""
    tokens = [
        (pair, branch, place)
        for pair, segment in enumerate(segments)
        for branch, length in enumerate(segment)
        for place in range(length)
    ]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for (row, query), (column, key) in itertools.product(enumerate(tokens), repeat=2):
        same_branch = key[1] == query[1] and key[2] <= query[2]
        mask[row, column] = key[0] == query[0] and (same_branch or (key[1] == 0 and query[1] > 0))
    return mask


@pytest.mark.parametrize("name", list(ROWS))
def test_the_mask_is_what_its_definition_says(name: str) -> None:
    assert torch.equal(Blocks(ROWS[name], CPU).dense_mask[0, 0], brute_force(ROWS[name]))


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("name", list(ROWS))
def test_blocks_give_the_values_and_gradients_of_the_whole_mask(name: str, key_heads: int, scaling: float | None) -> None:
    segments = ROWS[name]
    length = sum(segment.tokens for segment in segments)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator, requires_grad=True) for heads in (4, key_heads, key_heads)
    )
    upstream = torch.randn(1, length, 4, 8, generator=generator)
    blocks = Blocks(segments, CPU)
    module = SimpleNamespace(num_key_value_groups=4 // key_heads, training=True, is_causal=True)
    ours, weights = packed_attention(module, query, key, value, blocks.dense_mask, 0.0, scaling, packed=blocks)
    mask = brute_force(segments)[None, None]
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    inputs = (query, key, value)
    for ours_to, theirs_to in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours_to, theirs_to, rtol=1e-5, atol=1e-6)


def test_without_a_packed_row_it_is_sdpa() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    module = SimpleNamespace(num_key_value_groups=1, training=False, is_causal=True)
    ours, _ = packed_attention(module, query, key, value, None)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.equal(ours, theirs)
