"""Shingles of rows, runs of five tokens, and their MinHash in bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.inspection.parts import list_values

__all__ = ["BANDS", "Openings", "band_hashes", "jaccard", "row_shingles", "shared_openings"]

WIDTH = 5
"""Tokens of a shingle."""
BANDS, ROWS = 20, 5
"""Of a signature of 100 values. Rows with a Jaccard similarity of 0.8 agree in some band with probability 0.9996, of 0.3 with
0.05, of 0.1 with 0.0002."""
FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD], np.uint64
)
END = -1
"""Follows the last token of a text."""

Openings = Mapping[str, tuple[list[int], list[int]]]
"""Source -> the tokens that all of its prompts begin and end with."""


def shared_openings(prompts: Mapping[str, Sequence[list[int]]]) -> Openings:
    """Return what the prompts of each source begin and end with: a template's header, which says nothing about a row."""
    return {source: (_common(rows), _common([row[::-1] for row in rows])[::-1]) for source, rows in prompts.items()}


def _common(rows: Sequence[list[int]]) -> list[int]:
    # The first and the last of sorted lists differ where any two of them do.
    low, high = min(rows), max(rows)
    return low[: _agreeing(low, high)]


def _agreeing(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def row_shingles(rows: pa.Table, names: Sequence[str], openings: Openings) -> list[NDArray[np.uint32]]:
    """Return the hashed shingles of each row, with repetitions.

    A text of n tokens has n of them, the last four shorter; none reaches from a text into the next one.

    Args:
        rows: with `source` and columns of token ids, the prompt's first.
        names: those columns.
        openings: what is left out of prompts.
    """
    sources = rows["source"].to_pylist()
    texts = [list_values(rows[name]) for name in names]
    flat: list[NDArray[np.generic]] = []
    ends, gap = [], np.full(WIDTH - 1, END)
    size = 0
    for index, source in enumerate(sources):
        for number, (values, offsets) in enumerate(texts):
            ids = values[offsets[index] : offsets[index + 1]]
            ids = _without(ids, *openings.get(source, ([], []))) if number == 0 else ids
            flat += [ids, gap]
            size += len(ids) + len(gap)
        ends.append(size)
    if not flat:
        return []
    tokens = np.concatenate(flat).astype(np.int64)
    hashes, keep = _windows(tokens), tokens != END
    return [hashes[start:end][keep[start:end]] for start, end in zip([0, *ends], ends, strict=False)]


def _without(ids: NDArray[np.generic], head: Sequence[int], tail: Sequence[int]) -> NDArray[np.generic]:
    # A row of a sample's source may begin otherwise than the sample did.
    start = len(head) if head and ids[: len(head)].tolist() == list(head) else 0
    ids = ids[start:]
    return ids[: -len(tail)] if tail and len(ids) >= len(tail) and ids[-len(tail) :].tolist() == list(tail) else ids


def _windows(ids: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Hash the window that begins at each position, shape (tokens,); beyond the end there are no tokens."""
    padded = np.concatenate([ids, np.full(WIDTH - 1, END)]).astype(np.uint64) + np.uint64(2)
    total = np.zeros(len(ids), np.uint64)
    for shift, factor in enumerate(FACTORS):
        total += padded[shift : shift + len(ids)] * factor
        total ^= total >> np.uint64(29)
        total *= FACTORS[-1]
    return (total >> np.uint64(32)).astype(np.uint32)


def band_hashes(shingles: Sequence[NDArray[np.uint32]]) -> NDArray[np.uint64]:
    """Return a hash of each band of each row's MinHash signature, shape (rows, `BANDS`)."""
    from datasketch import MinHash

    empty = MinHash(num_perm=BANDS * ROWS, hashfunc=int)
    signatures = np.empty((len(shingles), BANDS * ROWS), np.uint64)
    for row, hashes in enumerate(shingles):
        sketch = empty.copy()
        sketch.update_batch(hashes.tolist())
        signatures[row] = sketch.hashvalues
    bands = signatures.reshape(len(shingles), BANDS, ROWS)
    total = np.zeros(bands.shape[:2], np.uint64)
    for row, factor in enumerate(FACTORS):
        total = (total ^ (total >> np.uint64(31))) * FACTORS[0] + bands[:, :, row] * factor
    return total


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Return the Jaccard similarity of two sets of shingles, each without repetitions; 0 of empty ones."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(1, len(left) + len(right) - shared)
