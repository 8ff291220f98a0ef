"""Attention of packed rows: every completion token attends to its prompt and its own completion only.

On a CPU each pair is two calls of `scaled_dot_product_attention`, so that masked blocks are not computed; on a GPU the same
mask is used by FlexAttention. Registered with transformers as `prefray_packed`, which is `sdpa` without a packed row.
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
    """Attention masks of a packed row."""

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        self.segments = segments
        self.device = device

    @cached_property
    def masks(self) -> list[Tensor]:
        """Mask per pair of its rejected tokens over the prompt and themselves, shape (rejected, shared + rejected)."""
        shapes = [(segment.rejected, segment.shared + segment.rejected) for segment in self.segments]
        return [
            torch.ones(shape, dtype=torch.bool, device=self.device).tril(segment.shared)
            for shape, segment in zip(shapes, self.segments, strict=True)
        ]

    @cached_property
    def dense_mask(self) -> Tensor:
        """The full mask, shape (1, 1, T, T), true where attention is allowed."""
        pair, branch = self._membership()
        position = torch.arange(len(pair), device=self.device)
        return _allowed(pair, branch, position[:, None], position[None, :])[None, None]

    @cached_property
    def block_mask(self) -> Any:
        """The mask in FlexAttention's format."""
        from torch.nn.attention.flex_attention import create_block_mask

        pair, branch = self._membership()

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _allowed(pair, branch, query, key)

        mask = create_block_mask(allowed, None, None, len(pair), len(pair), device=self.device)
        mask.ndim = 4  # GPT-2 reads it, and passes the mask on
        return mask

    def _membership(self) -> tuple[Tensor, Tensor]:
        """Return for each token its pair, and its branch: 0 prompt, 1 chosen, 2 rejected completion."""
        lengths = torch.tensor(self.segments)
        pair = torch.repeat_interleave(torch.arange(len(lengths)), lengths.sum(dim=1))
        branch = torch.repeat_interleave(torch.arange(3).repeat(len(lengths)), lengths.flatten())
        return pair.to(self.device), branch.to(self.device)


def _allowed(pair: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    same_branch = (branch[key] == 0) | (branch[key] == branch[query])
    return (key <= query) & (pair[key] == pair[query]) & same_branch


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
    """Compute attention by transformers' interface: query of shape (1, heads, T, size), output (1, T, heads, size)."""
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Without `dropout`, for which FlexAttention raises: `why_not_packed` refuses models that drop attention out there.
    if query.is_cuda:
        return flex_attention_forward(module, query, key, value, packed.block_mask, scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    options = {"dropout_p": dropout, "scale": scaling}
    # One split per tensor: separate slices would each allocate a gradient of the whole row's size.
    lengths = [length for segment in packed.segments for length in segment]
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    # `parts` yields prompt, chosen and rejected in turn; each loop takes one pair from it.
    for shared, chosen, rejected, mask in zip(parts, parts, parts, packed.masks, strict=True):
        # Prompt and chosen completion are one causal sequence, for which SDPA needs no mask.
        first = [torch.cat(both, dim=2) for both in zip(shared, chosen, strict=True)]
        if first[0].shape[2]:
            outputs.append(scaled_dot_product_attention(*first, is_causal=True, **options))
        # Padding and unscored tokens are segments of a prompt alone.
        if rejected[0].shape[2]:
            seen = [torch.cat(both, dim=2) for both in zip(shared[1:], rejected[1:], strict=True)]
            outputs.append(scaled_dot_product_attention(rejected[0], *seen, attn_mask=mask, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def register() -> None:
    """Register `prefray_packed` with transformers; idempotent."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    # For padded inputs; the 4D mask of a packed row is passed on by transformers as it is.
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
