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

__all__ = ["ForwardLimits", "StepLoader", "pair_lengths", "too_long"]

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
            rows = [self.rows[int(members[place])] for place in taken]
            batches.append(self.collate(rows, taken, counts=bool(places)))
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
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not isinstance(rows, Dataset):
        return np.array([[len(row[name]) for name in columns] for row in rows], dtype=np.int64).reshape(-1, 3)
    parts: list[NDArray[np.int64]] = []
    for table in rows.with_format("arrow").iter(10_000):
        counted = [_list_lengths(table[name]) for name in columns]
        parts.append(np.stack(counted, axis=1))
    return np.concatenate(parts)


def _list_lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def too_long(tokens: Sequence[int] | NDArray[np.int64], budget: int) -> int | None:
    """The first row that no forward of `budget` tokens takes, or None."""
    over = np.flatnonzero(np.asarray(tokens) > budget)
    return int(over[0]) if len(over) else None
