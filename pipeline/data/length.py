"""The length rule: prompt and longest completion within `sequence_len`, BOS and EOS counted."""

from __future__ import annotations

import numpy as np

from pipeline.data.tokenise import Tokenised

__all__ = ["STRATEGIES", "fit"]

STRATEGIES = ("drop", "truncate", "raise")


def fit(row: Tokenised, limit: int, strategy: str) -> Tokenised | None:
    """The row if it fits in `limit` tokens; else what `strategy` makes of it, None for a row to drop.

    `truncate` cuts the end of completions. It drops a row whose prompt leaves them no room, and a pair that is the same
    after the cut, since neither teaches anything.
    """
    if row.length <= limit:
        return row
    room = limit - len(row.prompt)
    if strategy != "truncate" or room <= 0:
        return None
    cut = tuple(ids[:room] for ids in row.completions)
    if len(cut) == 2 and np.array_equal(*cut):
        return None
    return Tokenised(row.prompt, cut)
