"""The batch plan: which rows make up the global batch of a step, and how a global batch becomes forwards.

The first is a pure function of (seed, epoch, step, global batch size, number of rows): it doesn't depend on the number of
workers, on packing, or on what happened before. The second is a pure function of the rows' lengths, the number of workers
and the limit of a forward.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchPlan", "Forward", "fill", "packed_tokens", "share_out"]

Forward = list[int]
"""Places, within a global batch, of the rows that one forward takes; empty for one that only keeps the others company."""


@dataclass(frozen=True)
class BatchPlan:
    """Order of the rows of a run.

    Every epoch goes through all rows once, in an order of its own, or without a seed in theirs. The last global batch of an
    epoch is what is left, unless `drop_last` leaves it out.
    """

    num_rows: int
    global_batch_size: int
    seed: int | None
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, at least 1."""
        whole, rest = divmod(self.num_rows, self.global_batch_size)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All rows in the order of an epoch (from 0), shape (num_rows,)."""
        if self.seed is None:
            return np.arange(self.num_rows)
        return _permutation(self.seed, epoch, self.num_rows)

    def members(self, epoch: int, step: int) -> NDArray[np.int64]:
        """Rows of the global batch of `step` (from 0) in `epoch` (from 0), shape (at most global_batch_size,)."""
        start = step * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.setflags(write=False)
    return order


def share_out(lengths: Sequence[int], world_size: int, budget: int, most_rows: int | None = None) -> list[list[Forward]]:
    """Divide a global batch into the forwards of every worker.

    Workers get about the same number of tokens, and all the same number of forwards, at least one, of which none has more
    than `budget` tokens or `most_rows` rows. Where forwards outnumber rows, some are empty.

    Args:
        lengths: tokens of each row of the global batch.
        budget: tokens of a forward.
        most_rows: rows of a forward; None for no limit.

    Returns:
        For each worker its forwards.

    Raises:
        ValueError: for a row that is longer than the budget.
    """
    # Where rows are counted, workers get equally many.
    limit = None if most_rows is None else math.ceil(len(lengths) / world_size)
    packed = [fill(lengths, budget, most_rows, share) for share in _shares(lengths, world_size, limit)]
    number = max(1, *(len(forwards) for forwards in packed))
    return [_spread(forwards, number) for forwards in packed]


def fill(
    lengths: Sequence[int], budget: int, most_rows: int | None = None, places: Sequence[int] | None = None
) -> list[Forward]:
    """Fill as few forwards as first fit, longest first, finds.

    Args:
        places: which of the rows; all when None.

    Raises:
        ValueError: for a row that is longer than the budget.
    """
    forwards: list[Forward] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)) if places is None else places, key=lambda place: (-lengths[place], place)):
        if lengths[place] > budget:
            raise ValueError(
                f"tokens_per_forward: a row has {lengths[place]} tokens and a forward takes {budget}; "
                f"set it to {lengths[place]} or more"
            )
        fits = (index for index, left in enumerate(room) if left >= lengths[place] and _has_place(forwards[index], most_rows))
        target = next(fits, None)
        if target is None:
            forwards.append([])
            room.append(budget)
            target = len(forwards) - 1
        forwards[target].append(place)
        room[target] -= lengths[place]
    return forwards


def _has_place(forward: Forward, most_rows: int | None) -> bool:
    return most_rows is None or len(forward) < most_rows


def _shares(lengths: Sequence[int], world_size: int, limit: int | None) -> list[list[int]]:
    """Longest first, each to the worker with the fewest tokens so far, and to each at most `limit`."""
    loads = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(place)
        if limit is None or len(shares[rank]) < limit:
            heapq.heappush(loads, (load + lengths[place], rank))
    return shares


def _spread(forwards: list[Forward], number: int) -> list[Forward]:
    """The same rows in exactly `number` forwards: those of the most rows are divided first."""
    forwards = [list(forward) for forward in forwards]
    while len(forwards) < number:
        fullest = max(forwards, key=len, default=[])
        half = math.ceil(len(fullest) / 2)
        forwards.append(fullest[half:])
        del fullest[half:]
    return forwards


def packed_tokens(
    lengths: NDArray[np.int64], max_length: int | None = None, truncation_mode: str = "keep_start"
) -> NDArray[np.int64]:
    """Tokens of each pair in a packed row, shape (rows,), as `strategies.packing.layout.pair_tokens` lays it out.

    The last prompt token isn't fed on its own: it stands at the head of each completion, whose last token predicts nothing.

    Args:
        lengths: tokens of prompt, chosen and rejected, shape (rows, 3).
        max_length: tokens that a sequence keeps, None for all of them, at the end that `truncation_mode` says.
    """
    prompt, chosen, rejected = lengths.T
    limit = max_length if max_length is not None else int(lengths.sum(axis=1).max(initial=0))
    kept = np.minimum(prompt, limit)
    whole = [np.minimum(completion, limit - kept) for completion in (chosen, rejected)]
    shared = np.maximum(kept - 1, 0)
    # Without a prompt nothing predicts a completion's first token, and the last one predicts nothing.
    lost = (kept == 0).astype(np.int64)
    start = shared + sum(np.maximum(completion - lost, 0) for completion in whole)
    if truncation_mode == "keep_start":
        return start
    apart = sum(np.maximum(np.minimum(prompt + completion, limit) - 1, 0) for completion in (chosen, rejected))
    return np.where(prompt + np.maximum(chosen, rejected) > limit, apart, start)
