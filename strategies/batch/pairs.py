"""Pairs of one forward, packed or padded, and what a worker runs in one step.

Tensors of tokens have shape (2B, L): the chosen completions, then the rejected ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from strategies.batch.row_ledger import RowId
from strategies.dataset_rows import ROW_ID
from strategies.models.work import Tokens, triangle
from strategies.packing.head import TokenOutputs
from strategies.packing.layout import PackedRow, PairTokens, Segment, pack, pair_tokens
from strategies.packing.support import score_row
from strategies.vision.features import Pictures, pictures_of_forward, run_padded
from strategies.vision.images import pictures_of
from strategies.vision.processing import VisionProcessing

__all__ = ["PackedPairs", "PaddedPairs", "PairBatch", "PairCollator", "WorkerStep"]

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PairBatch(ABC):
    """B pairs of one forward."""

    positions: Tensor
    """Shape (B,): positions of the pairs in the global batch."""
    sequence_tokens: int
    """Tokens of the 2B sequences without padding, prompts counted twice."""
    segments: tuple[Segment, ...] = ()
    """Layout of the pairs, shape (B,)."""
    row_ids: tuple[RowId, ...] = ()
    """Ids of the pairs, shape (B,)."""
    pictures: Pictures | None = None
    is_real: bool = True
    """False for a forward that only keeps the number of forwards equal on all workers: its loss and metrics are dropped."""

    @property
    @abstractmethod
    def mask(self) -> Tensor:
        """Shape (2B, L): 1 where a completion token is predicted."""

    @property
    @abstractmethod
    def reference(self) -> Tensor | None:
        """Shape (2B, L): log-probabilities under the reference; None where the rows bring none."""

    @property
    @abstractmethod
    def fed_tokens(self) -> int:
        """Tokens that a forward computes, padding included."""

    @property
    @abstractmethod
    def work(self) -> Tokens:
        """Tokens that a forward has to compute, without padding."""

    @abstractmethod
    def run(self, model: Any, wanted: tuple[str, ...] = (), **options: Any) -> Any:
        """Run one forward; return log-probabilities and the `wanted` statistics, fields of shape (2B, L).

        Args:
            options: further arguments of the model, for padded batches.
        """

    def map(self, change: Change) -> Self:
        """Return the batch with `change` applied to every tensor."""
        return replace(self, **{name: _map(value, change) for name, value in vars(self).items()})


def _map(value: Any, change: Change) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return value.map(change) if isinstance(value, PackedRow | Pictures) else value


@dataclass(frozen=True)
class PackedPairs(PairBatch):
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
        return self.row.input_ids.numel()

    @property
    def work(self) -> Tokens:
        segments = self.segments
        return Tokens(sum(pair.tokens for pair in segments), sum(pair.keys for pair in segments), len(self.row.labels))

    def run(self, model: Any, wanted: tuple[str, ...] = (), **options: Any) -> TokenOutputs:
        assert not options, "options of padded batches"
        outputs = score_row(model, self.row, wanted, self.pictures.pixels if self.pictures else None)
        statistics = {name: getattr(outputs, name) for name in wanted}
        unpacked = {name: self.row.unpack(values) for name, values in statistics.items()}
        return TokenOutputs(self.row.unpack(outputs.log_probs), **unpacked)


@dataclass(frozen=True)
class PaddedPairs(PairBatch):
    """Pairs as 2B sequences of T tokens, padded at the end; L = T - 1. Tensors of ids and masks have shape (2B, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    # The default is what replaces the abstract property: without one the class couldn't be instantiated.
    reference: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.completion_mask[:, 1:]

    @property
    def fed_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def work(self) -> Tokens:
        # The prompt once for each completion, whose last token is fed too.
        lengths = [pair.shared + branch + 1 for pair in self.segments for branch in (pair.chosen, pair.rejected)]
        scored = sum(pair.chosen + pair.rejected for pair in self.segments)
        return Tokens(sum(lengths), sum(map(triangle, lengths)), scored)

    def run(self, model: Any, wanted: tuple[str, ...] = (), **options: Any) -> Any:
        # TRL's fused head returns the statistics that it was configured with when it was added to the model.
        labels = self.input_ids.masked_fill(self.completion_mask == 0, -100)
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": labels}
        return run_padded(model, inputs, self.pictures, copies=2, **options)


@dataclass(frozen=True)
class WorkerStep:
    """One worker's part of a global batch: as many forwards as every other worker has."""

    batches: tuple[PairBatch, ...]
    global_pairs: int
    """Pairs of the global batch, over all workers."""

    def to(self, device: torch.device) -> WorkerStep:
        """Return the step with its tensors on `device`."""
        # A copy overlaps with computation only where `pin_memory` has pinned its source; elsewhere the flag has no effect.
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> WorkerStep:
        """Return the step in pinned host memory; called by torch's data loader."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Change) -> WorkerStep:
        return replace(self, batches=tuple(batch.map(change) for batch in self.batches))

    @property
    def fed_tokens(self) -> int:
        return sum(batch.fed_tokens for batch in self.batches)


@dataclass(frozen=True)
class PairCollator:
    """Makes the forwards of a worker: packed rows, or padded batches where `padding` is TRL's collator.

    Args:
        max_length: maximum tokens of a sequence, None for no limit; `truncation_mode` names the end that is kept.
        pad_to_multiple_of: of a packed row's tokens.
        vision: where rows have pictures. A forward of rows without any gets a blank one, so that every worker runs the
            model's tower.
    """

    max_length: int | None
    truncation_mode: str
    padding: Any = None
    pad_to_multiple_of: int | None = None
    pad_token_id: int = 0
    vision: VisionProcessing | None = None

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], positions: Sequence[int], is_real: bool = True, numbers: Sequence[int] = ()
    ) -> PairBatch:
        """Return a forward of `rows`; `numbers` replace the `row_id` of rows that have none."""
        pairs = [pair_tokens(row, self.max_length, self.truncation_mode) for row in rows]
        # A data set returns None for the id of a row that has none while other rows have one.
        ids = ((row.get(ROW_ID), number) for row, number in zip(rows, numbers or positions, strict=True))
        common: dict[str, Any] = {
            "positions": torch.tensor(positions),
            "sequence_tokens": sum(pair.sequence_tokens for pair in pairs),
            "segments": tuple(pair.segment for pair in pairs),
            "row_ids": tuple(number if row_id is None else row_id for row_id, number in ids),
            "is_real": is_real,
        }
        pictures = None
        if self.vision is not None:
            pictures = pictures_of_forward([pictures_of(row) for row in rows], self.vision)
        if self.padding is not None:
            return PaddedPairs(*_pad(rows, pairs, self.padding), pictures=pictures, **common)
        unscored = pictures.unscored if pictures is not None else ()
        row = pack(pairs, self.pad_to_multiple_of, self.pad_token_id, unscored)
        return PackedPairs(row, pictures=pictures, **common)


def _pad(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[PairTokens], collator: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pad prepared rows with TRL's collator; `pairs` are the same rows, laid out. Returns the fields of `PaddedPairs`."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    # Lists, since the collator joins prompt and completion by `+`, which adds arrays. Without the reference's scores, of which
    # TRL 1.16 stacks one number per row; here each token has one.
    padded = collator([{name: list(row[name]) for name in columns} for row in rows])
    mask, reference = padded["completion_mask"][:, 1:].bool(), None
    if pairs[0].reference is not None:
        scores = [torch.as_tensor(pair.reference[side]) for side in (0, 1) for pair in pairs]  # type: ignore[index]
        # The mask is filled row by row, and the collator's rows are in the order of `scores`: all chosen, then all rejected.
        reference = torch.zeros(mask.shape).masked_scatter(mask, torch.cat(scores).float())
    return padded["input_ids"], padded["attention_mask"], padded["completion_mask"], reference
