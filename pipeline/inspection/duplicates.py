"""Groups of near duplicates: candidates by bands of MinHash, verified by the Jaccard similarity of their shingles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.inspection.shingles import jaccard

__all__ = ["SIMILAR", "near_duplicates"]

SIMILAR = 0.75
"""Least Jaccard similarity of near duplicates."""

Indices = NDArray[np.int64]
Shingles = Mapping[int, NDArray[np.uint32]]


def near_duplicates(
    rows: int, bands: Iterable[NDArray[np.uint64]], shingles_of: Callable[[Indices], Shingles], similar: float = SIMILAR
) -> Indices:
    """Return for each row the first row of its group of near duplicates, itself where it has none; shape (rows,).

    Groups are transitive: rows of one group need not all be similar to each other.

    Args:
        rows: their number.
        bands: for each band its hash of every row, shape (rows,).
        shingles_of: returns the shingles of rows, without repetitions.
        similar: least Jaccard similarity.
    """
    candidates = _candidates(rows, bands)
    shingles = shingles_of(np.unique(candidates)) if len(candidates) else {}
    first = np.arange(rows)
    for left, right in candidates.tolist():
        one, other = _root(first, left), _root(first, right)
        if one != other and jaccard(shingles[left], shingles[right]) >= similar:
            first[max(one, other)] = min(one, other)
    return np.array([_root(first, row) for row in range(rows)], dtype=np.int64)


def _candidates(rows: int, bands: Iterable[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Return pairs of rows that agree in a band, shape (pairs, 2): each with the first such row, and with the one before.

    Not every two of them: a thousand equal rows would be half a million pairs.
    """
    found: Indices = np.zeros(0, dtype=np.int64)
    for hashes in bands:
        order = np.argsort(hashes, kind="stable")
        sorted_hashes = hashes[order]
        same = np.flatnonzero(sorted_hashes[1:] == sorted_hashes[:-1]) + 1
        # Of a run of equal hashes, the index of its first.
        starts = np.searchsorted(sorted_hashes, sorted_hashes[same], side="left")
        pairs = [order[starts] * rows + order[same], order[same - 1] * rows + order[same]]
        found = np.unique(np.concatenate([found, *pairs]))
    return np.stack([found // rows, found % rows], axis=1)


def _root(first: Indices, row: int) -> int:
    while first[row] != row:
        # Halves the path for the next one.
        first[row] = first[first[row]]
        row = int(first[row])
    return row
