"""The batch plan: the rows of each step's global batch, and how a global batch is cut into forwards.

The first is a pure function of (seed, epoch, step, global batch size, number of rows), independent of the number of workers,
of packing, and of earlier steps. The second is a pure function of the rows' lengths, the number of workers and the limit of
a forward.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchPlan", "Forward", "assign_forwards", "first_fit_decreasing", "packed_tokens"]

Forward = list[int]
"""Positions, within a global batch, of the rows of one forward; empty where it only keeps the number of forwards equal."""


@dataclass(frozen=True)
class BatchPlan:
    """Order of the rows of a run.

    Every epoch takes all rows once, shuffled by `seed` and epoch; without a seed the rows keep their order. The last global
    batch of an epoch may be smaller, unless `drop_last` drops it.
    """

    num_rows: int
    global_batch_size: int
    seed: int | None
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, at least 1."""
        whole, rest = divmod(self.num_rows, self.global_batch_size)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return all rows in the order of an epoch (from 0), shape (num_rows,)."""
        if self.seed is None:
            return np.arange(self.num_rows)
        return _permutation(self.seed, epoch, self.num_rows)

    def members(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Return the rows of the global batch of `step` (from 0) in `epoch` (from 0), shape (at most global_batch_size,)."""
        start = step * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    # Not `seed + epoch`, by which runs of neighbouring seeds would share most of their orders.
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    # The cache gives the same array to every step of an epoch.
    order.setflags(write=False)
    return order


def assign_forwards(lengths: Sequence[int], world_size: int, budget: int, most_rows: int | None = None) -> list[list[Forward]]:
    """Assign the rows of a global batch to the forwards of every worker.

    Workers get about the same number of tokens, and all the same number of forwards, at least one, each of at most `budget`
    tokens and `most_rows` rows. If there are more forwards than rows, some are empty.

    Args:
        lengths: tokens of each row of the global batch.
        budget: maximum tokens of a forward.
        most_rows: maximum rows of a forward; None for no limit.

    Returns:
        The forwards of each worker.

    Raises:
        ValueError: for a row that is longer than the budget.
    """
    # Padded forwards are limited by rows, so that workers get equally many rows.
    limit = None if most_rows is None else math.ceil(len(lengths) / world_size)
    packed = [_first_fit(lengths, rows, budget, most_rows) for rows in _balance(lengths, world_size, limit)]
    # Gradients are exchanged in the backward pass of the last forward: all workers need the same number, and at least one.
    count = max(1, *(len(forwards) for forwards in packed))
    return [_pad_forward_count(forwards, count) for forwards in packed]


def first_fit_decreasing(
    lengths: Sequence[int], budget: int, most_rows: int | None = None, positions: Sequence[int] | None = None
) -> list[Forward]:
    """Pack rows into forwards by first fit, longest first.

    Args:
        positions: the rows to pack; all when None.

    Raises:
        ValueError: for a row that is longer than the budget.
    """
    rows = range(len(lengths)) if positions is None else sorted(positions)
    return _first_fit(lengths, _longest_first(lengths, rows), budget, most_rows)


def _longest_first(lengths: Sequence[int], positions: Sequence[int]) -> list[int]:
    # Ties by position (`reverse` keeps their order), and below by rank: every worker must compute the same assignment.
    return sorted(positions, key=lengths.__getitem__, reverse=True)


def _first_fit(lengths: Sequence[int], positions: Sequence[int], budget: int, most_rows: int | None) -> list[Forward]:
    """Pack rows, longest first, each into the first forward that has room for it."""
    forwards: list[Forward] = []
    room: list[int] = []
    first_open = 0
    for position in positions:
        length = lengths[position]
        if length > budget:
            raise ValueError(
                f"tokens_per_forward: a row has {length} tokens and a forward takes {budget}; set it to {length} or more"
            )
        target = len(room)
        for index, left in enumerate(islice(room, first_open, None), first_open):
            if left >= length:
                target = index
                break
        if target == len(room):
            forwards.append([])
            room.append(budget)
        forwards[target].append(position)
        # A forward with the most rows has no room, not even for a row without tokens.
        room[target] = -1 if len(forwards[target]) == most_rows else room[target] - length
        while first_open < len(room) and room[first_open] < 0:
            first_open += 1
    return forwards


def _balance(lengths: Sequence[int], world_size: int, limit: int | None) -> list[list[int]]:
    """Assign rows, longest first, to the worker with the fewest tokens so far; at most `limit` rows to each."""
    # A heap of `tokens * world_size + rank`: single integers compare several times faster than pairs.
    loads = list(range(world_size))
    assigned: list[list[int]] = [[] for _ in loads]
    for position in _longest_first(lengths, range(len(lengths))):
        load = loads[0]
        rows = assigned[load % world_size]
        rows.append(position)
        # A full worker leaves the heap. Limits add up to at least the number of rows, so that it can't run empty.
        if len(rows) == limit:
            heapq.heappop(loads)
        else:
            heapq.heapreplace(loads, load + lengths[position] * world_size)
    return assigned


def _pad_forward_count(forwards: list[Forward], count: int) -> list[Forward]:
    """Distribute the same rows over exactly `count` forwards, halving those with the most rows first."""
    while len(forwards) < count:
        fullest = max(forwards, key=len, default=[])
        # Part of a forward that keeps the limits keeps them too. A single row can't be halved: the new forward is then empty.
        half = math.ceil(len(fullest) / 2)
        forwards.append(fullest[half:])
        del fullest[half:]
    return forwards


def packed_tokens(
    lengths: NDArray[np.int64], max_length: int | None = None, truncation_mode: str = "keep_start"
) -> NDArray[np.int64]:
    """Return the tokens of each pair in a packed row, shape (rows,), as `strategies.packing.layout.pair_tokens` lays it out.

    The last prompt token is not fed on its own: it starts each completion, whose last token predicts nothing and is left out.

    Args:
        lengths: tokens of prompt, chosen and rejected, shape (rows, 3).
        max_length: maximum tokens of a sequence, None for no limit; `truncation_mode` names the end that is kept.
    """
    prompt, chosen, rejected = lengths.T
    # One that cuts nothing, where there is none.
    limit = max_length if max_length is not None else int(lengths.sum(axis=1).max(initial=0))
    kept = np.minimum(prompt, limit)
    whole = [np.minimum(completion, limit - kept) for completion in (chosen, rejected)]
    shared = np.maximum(kept - 1, 0)
    # Without a prompt nothing predicts a completion's first token, and the last one predicts nothing.
    lost = (kept == 0).astype(np.int64)
    start = shared + sum(np.maximum(completion - lost, 0) for completion in whole)
    if truncation_mode == "keep_start":
        return start
    # Two ends of a prompt differ in length and can't be shared, also where only one of the sequences is cut (`_keep_end`).
    apart = sum(np.maximum(np.minimum(prompt + completion, limit) - 1, 0) for completion in (chosen, rejected))
    return np.where(prompt + np.maximum(chosen, rejected) > limit, apart, start)
