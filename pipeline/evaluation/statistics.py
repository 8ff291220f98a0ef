"""Means with confidence intervals, by the bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimates"]

RESAMPLES = 2000
AT_ONCE = 2**24
"""Most entries of a table of resampling counts, which bounds memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` rows with its confidence interval."""

    value: float
    low: float
    high: float
    n: int


def estimates(columns: Mapping[str, NDArray[np.float64]], confidence: float = 0.95, seed: int = 0) -> dict[str, Estimate]:
    """Estimate the mean of each column, ignoring NaN, with its percentile bootstrap interval.

    Rows are resampled 2000 times, the same ones for all columns (Efron and Tibshirani, 1993, chapter 13). With few rows the
    interval is too narrow; with one row it is a point.

    Args:
        columns: name -> values of the same rows, shape (rows,).
        confidence: confidence level, such as 0.95.
    """
    if not columns:
        return {}
    table = np.stack([np.asarray(values, dtype=np.float64) for values in columns.values()], axis=1)
    is_known = ~np.isnan(table)
    # NaN would spread through the matrix products; unknown values count neither in sums nor in numbers.
    filled = np.where(is_known, table, 0.0)
    rows = len(table)
    rng = np.random.default_rng(seed)
    means = []
    resamples = 0
    while resamples < RESAMPLES and rows:
        # At least one, though a single resample of very many rows exceeds the limit.
        number = min(RESAMPLES - resamples, max(1, AT_ONCE // rows))
        # How often each row is drawn, shape (resamples, rows): the means of all columns are matrix products.
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=number).astype(np.float64)
        # 0 / 0 where a resample drew no known value of a column; `nanquantile` leaves it out.
        with np.errstate(invalid="ignore"):
            means.append((counts @ filled) / (counts @ is_known))
        resamples += number
    return {name: _estimate(table[:, index], means, index, confidence) for index, name in enumerate(columns)}


def _estimate(values: NDArray[np.float64], means: list[NDArray[np.float64]], index: int, confidence: float) -> Estimate:
    valid = values[~np.isnan(values)]
    if not len(valid):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    resampled = np.concatenate([part[:, index] for part in means])
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    # The mean of the rows themselves, not of the resamples.
    return Estimate(float(valid.mean()), float(low), float(high), len(valid))
