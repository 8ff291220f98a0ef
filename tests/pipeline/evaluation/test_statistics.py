"""Bootstrapped intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.statistics import estimates


def test_the_interval_of_many_rows_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, size=400)
    found = estimates({"x": values})["x"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.15 * half)
    assert found.n == 400


def test_less_confidence_is_a_narrower_interval() -> None:
    values = np.arange(50, dtype=np.float64)
    wide, narrow = (estimates({"x": values}, confidence)["x"] for confidence in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_columns_are_drawn_together_and_unknown_values_left_out() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    found = estimates({"x": values, "twice": 2 * values, "some": np.array([1.0, np.nan, 3.0, np.nan])})
    assert found["twice"].low == pytest.approx(2 * found["x"].low)
    assert (found["some"].value, found["some"].n) == (2.0, 2)


def test_nothing_known_is_nan_and_one_row_a_point() -> None:
    found = estimates({"x": np.array([np.nan]), "y": np.array([3.0])})
    assert math.isnan(found["x"].value) and found["x"].n == 0
    assert (found["y"].low, found["y"].high) == (3.0, 3.0)


def test_many_rows_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.statistics.AT_ONCE", 1000)
    values = np.arange(300, dtype=np.float64)
    few = estimates({"x": values})["x"]
    monkeypatch.undo()
    assert few == estimates({"x": values})["x"]
