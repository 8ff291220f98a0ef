"""What the steps of a run have cost, by its records."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.tuning.cost import RunCost, cost_of


def record(step: int, seconds: float, operations: float | None = None) -> dict[str, Any]:
    counted = {} if operations is None else {"operations/step": operations}
    return {"step": step, "seconds/step": seconds, **counted}


def test_each_record_stands_for_the_steps_since_the_one_before() -> None:
    records = [record(2, 1.0, 10.0), {"step": 2, "eval_loss": 0.5}, record(5, 2.0, 20.0)]
    assert cost_of(records, 5, 3) == RunCost(operations=2 * 10 + 3 * 20, worker_seconds=3 * (2 * 1 + 3 * 2))


def test_steps_without_a_record_cost_what_the_others_do() -> None:
    found = cost_of([record(4, 0.5, 10.0)], 6, 1)
    assert (found.operations, found.worker_seconds) == (pytest.approx(60), pytest.approx(3))


def test_what_is_unknown_is_zero() -> None:
    assert cost_of([record(1, 1.0, 10.0), record(2, 1.0)], 2, 1) == RunCost(0.0, 2.0)
    assert cost_of([record(1, 1.0, 10.0)], 1, None) == RunCost(10.0, 0.0)
    assert cost_of([{"step": 1, "eval_loss": 0.5}], 1, 1) == cost_of([], 8, 1) == RunCost()
