"""KTO's mismatched completions: every row is paired with the completion of a row that has another prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

__all__ = ["MismatchedRows", "MismatchedSampler", "number_prompts"]

DIGEST_BYTES = 16

Index = tuple[int, int]
"""Index of a row, and of the row whose completion it is compared with."""


class MismatchedRows(Dataset):
    """Map-style data set indexed by `(row, other)`: the row, with `KL_completion_ids` from the other one."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        row, other = index
        return {**self.rows[row], "KL_completion_ids": self.rows[other]["completion_ids"]}


class MismatchedSampler(Sampler[Index]):
    """Yields every row once per epoch, paired with the completion of a row that has another prompt.

    In training the partner is the previous row of the global batch (for the first row, the last one); in an evaluation it is a
    fixed row of the whole data set. Where both have the same prompt, as the halves of a pair do, the partners of the batch are
    shifted. Order and partners depend only on the arguments and the epoch, not on the number of workers. If all rows have the
    same prompt, they are paired with each other.

    Args:
        rows: number of rows.
        block: rows of a global batch.
        seed: of the shuffle; None keeps the order of the rows.
        prompts: prompt id of each row, equal where prompts are equal; all different when None.
    """

    def __init__(
        self, rows: int, block: int, seed: int | None, prompts: Sequence[int] | NDArray[np.int64] | None = None
    ) -> None:
        self.rows, self.block, self.seed = rows, block, seed
        self._prompts: Sequence[int] | NDArray[np.int64] = range(rows) if prompts is None else prompts
        # Two rows of different prompts: whatever a row's prompt is, one of them has another.
        first = self._prompts[0] if rows else 0
        other = next((row for row in range(rows) if self._prompts[row] != first), None)
        self._spare = [0] if other is None else [0, other]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[Index]:
        if self.seed is None:
            # Partners are taken from a fixed shuffle: in the order of the data, neighbours are often answers to one prompt.
            shuffled = _shuffled(self.rows, seed=0).tolist()
            yield from sorted(zip(shuffled, self._partners(shuffled), strict=True))
            return
        order = _shuffled(self.rows, self.seed + self.epoch)
        for start in range(0, self.rows, self.block):
            block = order[start : start + self.block].tolist()
            # A last block of one row takes its partner from the previous block.
            partners = self._partners(block) if len(block) > 1 else [self._with_other_prompt(block[0], int(order[start - 1]))]
            yield from zip(block, partners, strict=True)

    def _partners(self, rows: list[int]) -> list[int]:
        """Return a partner for each row: the previous one, or where prompts clash, one of another group of equal prompts."""
        partners = [rows[-1], *rows[:-1]]
        if all(map(self._differ, rows, partners)):
            return partners
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self._prompts[row], []).append(index)
        # Sorted by prompt and shifted by the largest group, no row meets its own prompt unless that group is the majority.
        indices = [index for group in groups.values() for index in group]
        shift = max(map(len, groups.values())) if len(groups) > 1 else 1
        for position, index in enumerate(indices):
            wanted = rows[indices[(position + shift) % len(indices)]]
            # Rows of a majority prompt, or of a block with one prompt, still meet their own; they get a spare row.
            partners[index] = self._with_other_prompt(rows[index], wanted)
        return partners

    def _differ(self, row: int, other: int) -> bool:
        return self._prompts[row] != self._prompts[other]

    def _with_other_prompt(self, row: int, wanted: int) -> int:
        """Return the wanted row; if it has the prompt of `row`, a spare row with another prompt, if there is one."""
        if self._differ(row, wanted):
            return wanted
        return next((spare for spare in self._spare if self._differ(row, spare)), wanted)


def _shuffled(rows: int, seed: int) -> NDArray[np.int64]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).numpy()


def number_prompts(prompts: Iterable[Any], pictures: Sequence[bytes] = ()) -> NDArray[np.int64]:
    """Return an id for each prompt, equal where its token ids, and its digest in `pictures` if there are any, are equal.

    Ids count from 0, in the order in which the prompts are first met.
    """
    # Digests, one after the other: the ids of a million prompts would take gigabytes in every worker.
    digests = bytearray()
    for ids, picture in zip(prompts, pictures or repeat(b""), strict=bool(pictures)):
        digests += _digest(ids, picture)
    keys = np.frombuffer(digests, dtype=f"V{DIGEST_BYTES}")
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]


def _digest(ids: Any, picture: bytes) -> bytes:
    # As bytes of one dtype: the same ids differ in int32 and int64. The picture's digest has a length of its own, or is empty.
    return hashlib.blake2b(picture + np.asarray(ids, dtype=np.int64).tobytes(), digest_size=DIGEST_BYTES).digest()
