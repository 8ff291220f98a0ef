"""Attention of packed rows: every completion token sees its prompt and its own completion, nothing else.

On a CPU each pair is two products of `scaled_dot_product_attention`, so that no time goes into what the mask forbids; on a
GPU the same mask goes through FlexAttention. Registered with transformers as `prefray_packed`, which without a packed row is
`sdpa`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from strategies.packing.layout import Segment

__all__ = ["PACKED_ATTENTION", "Blocks", "packed_attention", "register"]

PACKED_ATTENTION = "prefray_packed"


class Blocks:
    """Which tokens of a packed row see which."""

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        self.segments = segments
        self.device = device

    @cached_property
    def masks(self) -> list[Tensor]:
        """Of each pair: what its rejected tokens see of the prompt and of themselves, shape (rejected, shared + rejected)."""
        return [
            torch.ones(one.rejected, one.shared + one.rejected, dtype=torch.bool, device=self.device).tril(one.shared)
            for one in self.segments
        ]

    @cached_property
    def dense_mask(self) -> Tensor:
        """The whole mask, shape (1, 1, T, T), true where attention is allowed."""
        pair, branch = self._membership()
        place = torch.arange(len(pair), device=self.device)
        return _allowed(pair, branch, place[:, None], place[None, :])[None, None]

    @cached_property
    def block_mask(self) -> Any:
        """The mask as FlexAttention takes it."""
        from torch.nn.attention.flex_attention import create_block_mask

        pair, branch = self._membership()

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _allowed(pair, branch, query, key)

        mask = create_block_mask(allowed, None, None, len(pair), len(pair), device=self.device)
        mask.ndim = 4  # GPT-2 asks its mask, which it then passes on
        return mask

    def _membership(self) -> tuple[Tensor, Tensor]:
        """For each token, its pair, and 0 for the prompt, 1 for the chosen and 2 for the rejected completion."""
        lengths = torch.tensor(self.segments)
        pair = torch.repeat_interleave(torch.arange(len(lengths)), lengths.sum(dim=1))
        branch = torch.repeat_interleave(torch.arange(3).repeat(len(lengths)), lengths.flatten())
        return pair.to(self.device), branch.to(self.device)


def _allowed(pair: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    own = (branch[key] == 0) | (branch[key] == branch[query])
    return (key <= query) & (pair[key] == pair[query]) & own


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: Blocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention as transformers calls it: query of shape (1, heads, T, size), output of shape (1, T, heads, size)."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.is_cuda:
        return flex_attention_forward(module, query, key, value, packed.block_mask, scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    options = {"dropout_p": dropout, "scale": scaling}
    # One split per tensor: slices of their own would each leave a gradient of the whole row's size.
    lengths = [length for segment in packed.segments for length in segment]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for shared, chosen, rejected, mask in zip(parts, parts, parts, packed.masks, strict=True):
        first = [torch.cat(both, dim=2) for both in zip(shared, chosen, strict=True)]
        if first[0].shape[2]:
            outputs.append(scaled_dot_product_attention(*first, is_causal=True, **options))
        if rejected[0].shape[2]:
            seen = [torch.cat(both, dim=2) for both in zip(shared[1:], rejected[1:], strict=True)]
            outputs.append(scaled_dot_product_attention(rejected[0], *seen, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make `prefray_packed` known to transformers; idempotent."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
