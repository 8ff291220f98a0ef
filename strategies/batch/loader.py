"""Data loader of a run's steps: each item is one worker's part of a global batch."""

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

from strategies.batch.pairs import PairCollator, WorkerStep
from strategies.batch.plan import BatchPlan, assign_forwards
from strategies.dataset_rows import ID_COLUMNS, REFERENCE_COLUMNS, first_row, picture_counts
from strategies.models.config import learned_positions

__all__ = ["ForwardLimits", "StepLoader", "check_pictures", "check_prompt_ends", "check_scores", "pair_lengths", "too_long"]

Step = tuple[int, int]
"""Epoch and step within it, both from 0."""


@dataclass(frozen=True)
class ForwardLimits:
    """Limits by which a global batch is cut into forwards: arguments of `assign_forwards`, and the rank."""

    world_size: int
    rank: int
    budget: int
    most_rows: int | None


class WorkerSteps(MapDataset):
    """Map-style data set of steps, indexed by (epoch, step). Its length is the number of rows, as trainers expect."""

    def __init__(
        self, rows: Any, lengths: NDArray[np.int64], plan: BatchPlan, limits: ForwardLimits, collate: PairCollator
    ) -> None:
        self.rows, self.lengths, self.plan, self.limits, self.collate = rows, lengths, plan, limits, collate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Step) -> WorkerStep:
        # The epoch is part of the index: data-loader processes hold copies of this object, which `set_epoch` doesn't reach.
        epoch, step = index
        members = self.plan.members(epoch, step)
        lengths = self.lengths[members].tolist()
        limits = self.limits
        # Every worker computes the assignment of all of them, so that none has to send it.
        forwards = assign_forwards(lengths, limits.world_size, limits.budget, limits.most_rows)[limits.rank]
        # A worker without rows for a forward runs the shortest row: every rank must take part in the collectives.
        shortest = int(np.argmin(lengths))
        batches = []
        for forward in forwards:
            positions = forward or [shortest]
            numbers = [int(members[position]) for position in positions]
            rows = [self.rows[number] for number in numbers]
            batches.append(self.collate(rows, positions, is_real=bool(forward), numbers=numbers))
        return WorkerStep(tuple(batches), len(members))


class StepSampler(Sampler[list[Step]]):
    """Yields the steps of one epoch, in order."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.epoch = 0

    # On resume accelerate's `skip_first_batches` makes a plain DataLoader; transformers 5.23 then calls this one directly.
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Step]]:
        return ([(self.epoch, step)] for step in range(self.steps))


class StepLoader(DataLoader):
    """Yields a `WorkerStep` per step. Every worker holds all rows and builds its own part, so accelerate must not shard it."""

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
            WorkerSteps(rows, lengths, plan, limits, collate),
            # Not `batch_size=None`: `skip_first_batches` wraps a batch sampler, and there would be none.
            batch_sampler=StepSampler(plan.steps_per_epoch),
            collate_fn=_only,
            **options,
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the trainer when an epoch begins."""
        self.batch_sampler.set_epoch(epoch)


def _only(items: list[WorkerStep]) -> WorkerStep:
    (item,) = items
    return item


def pair_lengths(rows: Any) -> NDArray[np.int64]:
    """Return the tokens of prompt, chosen and rejected of every prepared row, shape (rows, 3)."""
    return row_lengths(rows, ID_COLUMNS["pair"])


def row_lengths(rows: Any, columns: Sequence[str]) -> NDArray[np.int64]:
    """Return the tokens of every row's id columns, shape (rows, columns)."""
    parts = [[_list_lengths(column) for column in part] for part in _parts(rows, columns)]
    return np.concatenate([np.stack(part, axis=1) for part in parts])


def each_ids(rows: Any, column: str) -> Iterator[NDArray[Any]]:
    """Yield the token ids of a column of each row, shape (tokens,)."""
    for (part,) in _parts(rows, [column]):
        yield from np.split(_values(part), np.cumsum(_list_lengths(part))[:-1])


def check_positions(lengths: NDArray[np.int64], config: Any, max_length: int | None, name: str) -> None:
    """Check that a model with learned positions has one for every token.

    Args:
        lengths: tokens of the prompt and of each completion of every row, shape (rows, 1 + completions).
        config: the model's.
        max_length: tokens that a sequence is truncated to.

    Raises:
        ValueError: naming the first row that is longer.
    """
    # Rotary embeddings are computed for any position; a table of learned ones has no row beyond its last.
    most = learned_positions(config)
    if most is None or (max_length is not None and max_length <= most):
        return
    tokens = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    if (row := too_long(tokens, most)) is not None:
        raise ValueError(
            f"sequence_len: row {row} of {name} has {tokens[row]} tokens, and the model has learned positions for {most}; "
            f"set sequence_len: {most}"
        )


def check_pictures(
    rows: Any, lengths: NDArray[np.int64], max_length: int | None, keeps_start: bool, image_token: int, name: str
) -> None:
    """Check that truncation leaves the tokens of pictures whole.

    Args:
        lengths: tokens of the prompt and of each completion of every row, shape (rows, 1 + completions).
        max_length: tokens that a sequence is truncated to, at its end if `keeps_start`, else at its start.

    Raises:
        ValueError: naming the first row of which it doesn't.
    """
    tokens = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    if max_length is None:
        return
    for index in np.flatnonzero(tokens > max_length).tolist():
        prompt = list(rows[index]["prompt_ids"])
        last = max((position for position, token in enumerate(prompt) if token == image_token), default=-1)
        # keep_end cuts from the prompt's start, and is refused for every row with pictures, wherever they are in it.
        if last >= 0 and (last >= max_length or not keeps_start):
            raise ValueError(
                f"sequence_len: row {index} of {name} has {tokens[index]} tokens, and truncation to {max_length} would cut "
                f"tokens of its pictures; set sequence_len: {tokens[index]}, or leave the row out"
            )


def check_tokens_of_pictures(rows: Any, image_token: int, name: str) -> None:
    """Check that prompts have tokens of pictures exactly where rows have pictures.

    Raises:
        ValueError: naming the first row of which it isn't so.
    """
    with_tokens = np.concatenate([_have_token(prompts, image_token) for (prompts,) in _parts(rows, ["prompt_ids"])])
    with_pictures = picture_counts(rows).astype(bool)
    if len(bad := np.flatnonzero(with_tokens != with_pictures)):
        has, lacks = ("pictures", "tokens for them") if with_pictures[bad[0]] else ("tokens of pictures", "pictures")
        raise ValueError(f"{name}: row {bad[0]} has {has} and no {lacks}; give the columns that it was prepared with")


def _have_token(column: pa.ChunkedArray, token: int) -> NDArray[np.bool_]:
    """Return whether each row's ids hold the token, shape (rows,)."""
    owners = np.repeat(np.arange(len(column)), _list_lengths(column))
    found = np.zeros(len(column), dtype=bool)
    found[owners[_values(column) == token]] = True
    return found


def check_prompt_ends(rows: Any, image_token: int, name: str) -> None:
    """Check that no prompt ends in a picture: in a packed row its last token starts both completions, and so stands twice.

    Raises:
        ValueError: naming the first row whose prompt does.
    """
    start = 0
    for (prompts,) in _parts(rows, ["prompt_ids"]):
        ends = np.cumsum(_list_lengths(prompts)) - 1
        ids = _values(prompts)
        if len(bad := np.flatnonzero(ids[ends] == image_token) if len(ids) else ends[:0]):
            raise ValueError(
                f"sample_packing: the prompt of row {start + bad[0]} of {name} ends in a picture, which two answers can't "
                "share in a packed row; set sample_packing: false, or let text follow the picture"
            )
        start += len(ends)


def check_scores(rows: Any, lengths: NDArray[np.int64], name: str) -> None:
    """Check the reference log-probabilities of scored rows.

    Args:
        lengths: tokens of prompt, chosen and rejected, shape (rows, 3).

    Raises:
        ValueError: naming the first row that has another number of them than completion tokens, or a non-finite one.
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
            finite = np.isfinite(_values(scores))
            if not finite.all():
                # The first row that ends after the value; `right`, since a row ends where the next one's first value is.
                row = start + int(np.searchsorted(np.cumsum(numbers), np.flatnonzero(~finite)[0], side="right"))
                raise ValueError(f"{name}: row {row} has a value in {column} that isn't finite; score it again")
        start += len(numbers)


def _parts(rows: Any, columns: Sequence[str]) -> Iterator[list[pa.ChunkedArray]]:
    """Yield the columns of 10,000 rows at a time."""
    if isinstance(rows, Dataset):
        # As Arrow: the ids of a whole data set as Python lists would take many times their bytes.
        for table in rows.select_columns(list(columns)).with_format("arrow").iter(10_000):
            yield [table[name] for name in columns]
    else:
        yield [pa.chunked_array([pa.array([list(row[name]) for row in rows])]) for name in columns]


def _list_lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def _values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return the items of all lists of a column, one after the other."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def too_long(tokens: Sequence[int] | NDArray[np.int64], budget: int) -> int | None:
    """Return the index of the first row with more than `budget` tokens, or None."""
    over = np.flatnonzero(np.asarray(tokens) > budget)
    return int(over[0]) if len(over) else None
