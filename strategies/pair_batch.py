"""Pairs of one forward, packed or padded, and what a worker runs in one step.

Both kinds of pairs have `mask`, 1 where a completion token is predicted, and `reference`, log-probabilities under the
reference where the rows bring them. Tensors of tokens have shape (2B, L): the chosen completions, then the rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from strategies.ledger import RowId
from strategies.packing.head import TokenOutputs
from strategies.packing.layout import PackedRow, PairTokens, pack, pair_tokens
from strategies.packing.support import score_row
from strategies.rows import ROW_ID

__all__ = ["PackedPairs", "PaddedPairs", "PairBatch", "PairCollator", "StepShare"]

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PackedPairs:
    """Pairs in one row of tokens, each prompt once."""

    row: PackedRow

    @property
    def mask(self) -> Tensor:
        return self.row.mask

    @property
    def reference(self) -> Tensor | None:
        return self.row.reference

    @property
    def fed_tokens(self) -> int:
        """Tokens that a forward computes."""
        return self.row.input_ids.numel()

    def run(self, model: Any, wanted: tuple[str, ...] = ()) -> TokenOutputs:
        """One forward: log-probabilities and the `wanted` statistics, fields of shape (2B, L)."""
        outputs = score_row(model, self.row, wanted)
        statistics = {name: getattr(outputs, name) for name in wanted}
        unpacked = {name: self.row.unpack(values) for name, values in statistics.items()}
        return TokenOutputs(self.row.unpack(outputs.log_probs), **unpacked)

    def map(self, change: Change) -> PackedPairs:
        return PackedPairs(self.row.map(change))


@dataclass(frozen=True)
class PaddedPairs:
    """Pairs as 2B sequences of T tokens, padded at the end; L = T - 1. All fields have shape (2B, T) but `reference`."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    reference: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.completion_mask[:, 1:]

    @property
    def fed_tokens(self) -> int:
        """Tokens that a forward computes, padding among them."""
        return self.input_ids.numel()

    def run(self, model: Any, wanted: tuple[str, ...] = ()) -> Any:
        """As `PackedPairs.run`; which statistics, TRL's head was told when it was added."""
        labels = self.input_ids.masked_fill(self.completion_mask == 0, -100)
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)

    def map(self, change: Change) -> PaddedPairs:
        reference = None if self.reference is None else change(self.reference)
        return PaddedPairs(change(self.input_ids), change(self.attention_mask), change(self.completion_mask), reference)


def _pad(rows: Sequence[Mapping[str, Any]], pairs: Sequence[PairTokens], collator: Any) -> PaddedPairs:
    """Pad prepared rows with TRL's collator; `pairs` are the same rows, laid out."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    padded = collator([{name: list(row[name]) for name in columns} for row in rows])
    mask, reference = padded["completion_mask"][:, 1:].bool(), None
    if pairs[0].reference is not None:
        scores = [torch.as_tensor(pair.reference[side]) for side in (0, 1) for pair in pairs]  # type: ignore[index]
        reference = torch.zeros(mask.shape).masked_scatter(mask, torch.cat(scores).float())
    return PaddedPairs(padded["input_ids"], padded["attention_mask"], padded["completion_mask"], reference)


Pairs = PackedPairs | PaddedPairs


@dataclass(frozen=True)
class PairBatch:
    """One forward of a step."""

    pairs: Pairs
    places: Tensor
    """Shape (B,): places of the pairs in the global batch."""
    sequence_tokens: int
    """Tokens of the 2B sequences without padding, prompts counted twice."""
    row_ids: tuple[RowId, ...] = ()
    """Which rows the pairs are, shape (B,)."""
    counts: bool = True
    """False for a forward that only keeps the other workers company: its loss and metrics are left out."""

    def map(self, change: Change) -> PairBatch:
        return replace(self, pairs=self.pairs.map(change), places=change(self.places))


@dataclass(frozen=True)
class StepShare:
    """What one worker runs of a global batch: as many forwards as every other worker."""

    batches: tuple[PairBatch, ...]
    global_pairs: int
    """Pairs of the global batch, over all workers."""

    def to(self, device: torch.device) -> StepShare:
        """The share with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> StepShare:
        """The share in pinned host memory; data loaders call it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Change) -> StepShare:
        return replace(self, batches=tuple(batch.map(change) for batch in self.batches))

    @property
    def fed_tokens(self) -> int:
        return sum(batch.pairs.fed_tokens for batch in self.batches)


@dataclass(frozen=True)
class PairCollator:
    """Makes the forwards of a worker: packed rows, or padded batches where `padding` is TRL's collator.

    Args:
        max_length: tokens that a sequence keeps, None for all of them, at the end that `truncation_mode` says.
        pad_to_multiple_of: of a packed row's tokens.
    """

    max_length: int | None
    truncation_mode: str
    padding: Any = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[int], counts: bool = True, numbers: Sequence[int] = ()
    ) -> PairBatch:
        """Make a forward of `rows`; `numbers` stand for the `row_id` of rows that have none."""
        pairs = [pair_tokens(row, self.max_length, self.truncation_mode) for row in rows]
        if self.padding is not None:
            made: Pairs = _pad(rows, pairs, self.padding)
        else:
            made = PackedPairs(pack(pairs, self.pad_to_multiple_of, self.pad_token_id))
        # A data set gives None where some of its rows bring a name and this one doesn't.
        names = ((row.get(ROW_ID), number) for row, number in zip(rows, numbers or places, strict=True))
        row_ids = tuple(number if name is None else name for name, number in names)
        return PairBatch(made, torch.tensor(places), sum(pair.sequence_tokens for pair in pairs), row_ids, counts)
