"""The steps of a run as a data loader: each item is what one worker runs of one global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as MapDataset

from strategies.batching import BatchPlan, share_out
from strategies.pair_batch import PairCollator, StepShare
from strategies.rows import ID_COLUMNS, REFERENCE_COLUMNS, first_row

__all__ = ["ForwardLimits", "StepLoader", "check_scores", "pair_lengths", "too_long"]

Step = tuple[int, int]
"""An epoch and a step in it, both from 0."""


@dataclass(frozen=True)
class ForwardLimits:
    """How a global batch becomes forwards: `share_out`'s arguments."""

    world_size: int
    rank: int
    budget: int
    most_rows: int | None


class StepShares(MapDataset):
    """Steps by (epoch, step). Its length is the number of rows, as trainers expect of a data set."""

    def __init__(
        self, rows: Any, lengths: NDArray[np.int64], plan: BatchPlan, limits: ForwardLimits, collate: PairCollator
    ) -> None:
        self.rows, self.lengths, self.plan, self.limits, self.collate = rows, lengths, plan, limits, collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Step) -> StepShare:
        epoch, step = index
        members = self.plan.members(epoch, step)
        lengths = self.lengths[members].tolist()
        limits = self.limits
        forwards = share_out(lengths, limits.world_size, limits.budget, limits.most_rows)[limits.rank]
        shortest = int(np.argmin(lengths))
        batches = []
        for places in forwards:
            taken = places or [shortest]
            numbers = [int(members[place]) for place in taken]
            rows = [self.rows[number] for number in numbers]
            batches.append(self.collate(rows, taken, counts=bool(places), numbers=numbers))
        return StepShare(tuple(batches), len(members))


class StepSampler(Sampler[list[Step]]):
    """The steps of one epoch, in order."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Step]]:
        return ([(self.epoch, step)] for step in range(self.steps))


class StepLoader(DataLoader):
    """Yields a `StepShare` per step. Every worker makes its own, of all rows: nothing is to be sharded again."""

    def __init__(
        self,
        rows: Any,
        lengths: NDArray[np.int64],
        plan: BatchPlan,
        limits: ForwardLimits,
        collate: PairCollator,
        **options: Any,
    ) -> None:
        super().__init__(
            StepShares(rows, lengths, plan, limits, collate),
            batch_sampler=StepSampler(plan.steps_per_epoch),
            collate_fn=_only,
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer when an epoch begins."""
        self.batch_sampler.set_epoch(epoch)


def _only(items: list[StepShare]) -> StepShare:
    (item,) = items
    return item


def pair_lengths(rows: Any) -> NDArray[np.int64]:
    """Tokens of prompt, chosen and rejected of every prepared row, shape (rows, 3)."""
    parts = [[_list_lengths(column) for column in part] for part in _parts(rows, ID_COLUMNS["pair"])]
    return np.concatenate([np.stack(part, axis=1) for part in parts])


def check_scores(rows: Any, lengths: NDArray[np.int64], name: str) -> None:
    """Check the reference's log-probabilities of every row that brings them.

    Args:
        lengths: tokens of prompt, chosen and rejected, shape (rows, 3).

    Raises:
        ValueError: naming the first row that has another number of them than completion tokens, or one that isn't finite.
    """
    if not all(column in first_row(rows) for column in REFERENCE_COLUMNS):
        return
    start = 0
    for part in _parts(rows, REFERENCE_COLUMNS):
        for scores, tokens, column in zip(part, lengths[start:, 1:].T, REFERENCE_COLUMNS, strict=True):
            numbers = _list_lengths(scores)
            bad = np.flatnonzero(numbers != tokens[: len(numbers)])
            if len(bad):
                row, has, wants = start + bad[0], numbers[bad[0]], tokens[bad[0]]
                raise ValueError(
                    f"{name}: row {row} has {has} values in {column}, and {wants} completion tokens; score it again"
                )
            finite = np.isfinite(scores.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64))
            if not finite.all():
                row = start + int(np.searchsorted(np.cumsum(numbers), np.flatnonzero(~finite)[0], side="right"))
                raise ValueError(f"{name}: row {row} has a value in {column} that isn't finite; score it again")
        start += len(numbers)


def _parts(rows: Any, columns: Sequence[str]) -> Iterator[list[pa.ChunkedArray]]:
    """Columns of 10,000 rows at a time."""
    if isinstance(rows, Dataset):
        for table in rows.select_columns(list(columns)).with_format("arrow").iter(10_000):
            yield [table[name] for name in columns]
    else:
        yield [pa.chunked_array([pa.array([list(row[name]) for row in rows])]) for name in columns]


def _list_lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def too_long(tokens: Sequence[int] | NDArray[np.int64], budget: int) -> int | None:
    """The first row that no forward of `budget` tokens takes, or None."""
    over = np.flatnonzero(np.asarray(tokens) > budget)
    return int(over[0]) if len(over) else None
