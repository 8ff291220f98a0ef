"""The length limit: prompt and longest completion within `sequence_len`, BOS and EOS included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.tokenize import Tokenised

__all__ = ["STRATEGIES", "truncate", "truncate_all"]

STRATEGIES = ("drop", "truncate", "raise")


def truncate(row: Tokenised, limit: int, strategy: str) -> Tokenised | None:
    """Return the row if it fits in `limit` tokens; else the row truncated by `strategy`, None for one to drop.

    `truncate` cuts the end of completions. It drops a row whose prompt leaves no room for them, and a pair whose answers are
    equal after the cut: neither is of use. A prompt alone is never cut, since that would change the question.
    """
    if row.length <= limit:
        return row
    room = limit - len(row.prompt)
    if strategy != "truncate" or room <= 0:
        return None
    cut = tuple(ids[:room] for ids in row.completions)
    # They differed only beyond the limit.
    if len(cut) == 2 and np.array_equal(*cut):
        return None
    return Tokenised(row.prompt, cut)


def truncate_all(rows: Sequence[Tokenised], limit: int, strategy: str) -> list[Tokenised | None]:
    """Apply `truncate` to the rows of one raw row; drops both halves of a pair that are equal only after the cut."""
    truncated = [truncate(row, limit, strategy) for row in rows]
    # Halves that were equal before any cut are the data's own, and kept.
    is_cut = any(result is not row for result, row in zip(truncated, rows, strict=True))
    sequences = [np.concatenate([row.prompt, *row.completions]) for row in truncated if row is not None]
    if is_cut and len(sequences) == 2 and np.array_equal(sequences[0], sequences[1]):
        return [None, None]
    return truncated
