"""Means with confidence intervals, by the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimates"]

RESAMPLES = 2000
AT_ONCE = 2**24
"""Numbers of a table of counts, which bounds memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows, and the interval in which it lies with the confidence that was asked for."""

    value: float
    low: float
    high: float
    n: int


def estimates(columns: Mapping[str, NDArray[np.float64]], confidence: float = 0.95, seed: int = 0) -> dict[str, Estimate]:
    """The mean of each column, NaN left out, with its percentile bootstrap interval (Efron and Tibshirani, 1993, chapter 13).

    Rows are drawn with replacement, the same for all columns, 2000 times. With few rows the interval is too narrow, and of
    one row it is a point.

    Args:
        columns: name -> values, shape (rows,), of the same rows.
        confidence: such as 0.95.
    """
    if not columns:
        return {}
    table = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)
    known = ~np.isnan(table)
    filled = np.where(known, table, 0.0)
    rows = len(table)
    rng = np.random.default_rng(seed)
    means = []
    done = 0
    while done < RESAMPLES and rows:
        number = min(RESAMPLES - done, max(1, AT_ONCE // rows))
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=number).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((counts @ filled) / (counts @ known))
        done += number
    return {name: _estimate(table[:, place], means, place, confidence) for place, name in enumerate(columns)}


def _estimate(values: NDArray[np.float64], means: list[NDArray[np.float64]], place: int, confidence: float) -> Estimate:
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    drawn = np.concatenate([part[:, place] for part in means])
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(known.mean()), float(low), float(high), len(known))
