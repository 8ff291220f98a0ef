"""The batch plan: every row once, the same global batches whoever runs them, forwards within their limits."""

from __future__ import annotations

import hashlib
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.batch.plan import BatchPlan, assign_forwards, first_fit_decreasing

few = settings(max_examples=60, deadline=None)
plans = st.builds(
    BatchPlan,
    num_rows=st.integers(1, 200),
    global_batch_size=st.integers(1, 40),
    seed=st.none() | st.integers(0, 2**31),
    drop_last=st.booleans(),
)
batches = st.lists(st.integers(0, 50), min_size=1, max_size=40)
workers = st.integers(1, 9)
most = st.none() | st.integers(1, 8)


def epoch_of(plan: BatchPlan, epoch: int) -> list[int]:
    return [row for step in range(plan.steps_per_epoch) for row in plan.members(epoch, step).tolist()]


@few
@given(plans, st.integers(0, 5))
def test_an_epoch_has_every_row_once(plan: BatchPlan, epoch: int) -> None:
    rows = epoch_of(plan, epoch)
    left_out = plan.num_rows % plan.global_batch_size if plan.drop_last and plan.num_rows >= plan.global_batch_size else 0
    assert len(rows) == len(set(rows)) == plan.num_rows - left_out
    assert set(rows) <= set(range(plan.num_rows))


@few
@given(plans)
def test_all_global_batches_but_an_epochs_last_are_full(plan: BatchPlan) -> None:
    sizes = [len(plan.members(0, step)) for step in range(plan.steps_per_epoch)]
    assert sizes[:-1] == [plan.global_batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= plan.global_batch_size
    assert not plan.drop_last or len(sizes) == 1 or sizes[-1] == plan.global_batch_size


@few
@given(plans, st.integers(0, 5), st.data())
def test_a_run_that_resumes_goes_on_with_the_same_rows(plan: BatchPlan, epoch: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.steps_per_epoch))
    again = BatchPlan(plan.num_rows, plan.global_batch_size, plan.seed, plan.drop_last)
    tail = [row for later in range(step, again.steps_per_epoch) for row in again.members(epoch, later).tolist()]
    assert tail == epoch_of(plan, epoch)[step * plan.global_batch_size :]


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    orders = [tuple(BatchPlan(50, 8, seed).order(epoch)) for seed, epoch in itertools.product(range(4), range(4))]
    assert len(set(orders)) == len(orders)


def test_the_order_of_a_seed_is_the_same_on_every_machine() -> None:
    """Checkpoints resume in the middle of an epoch: another order would repeat rows and leave others out."""
    assert BatchPlan(8, 4, seed=42).order(0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    assert BatchPlan(8, 4, seed=42).order(1).tolist() == [0, 4, 6, 1, 2, 7, 3, 5]


def test_without_a_seed_rows_come_in_their_order() -> None:
    plan = BatchPlan(5, 2, seed=None)
    assert [plan.members(3, step).tolist() for step in range(3)] == [[0, 1], [2, 3], [4]]


@few
@given(batches, workers, st.integers(50, 120), most)
def test_every_row_of_a_global_batch_runs_once(lengths: list[int], world: int, budget: int, most_rows: int | None) -> None:
    """Whatever the number of workers, the budget or the most rows, so that membership depends on none of them."""
    shares = assign_forwards(lengths, world, budget, most_rows)
    places = [place for share in shares for forward in share for place in forward]
    assert len(shares) == world
    assert sorted(places) == list(range(len(lengths)))


@few
@given(batches, workers, st.integers(50, 120), most)
def test_forwards_stay_within_their_limits(lengths: list[int], world: int, budget: int, most_rows: int | None) -> None:
    for forward in itertools.chain.from_iterable(assign_forwards(lengths, world, budget, most_rows)):
        assert sum(lengths[place] for place in forward) <= budget
        assert most_rows is None or len(forward) <= most_rows


@few
@given(batches, workers, st.integers(50, 120), most)
def test_workers_run_equally_many_forwards(lengths: list[int], world: int, budget: int, most_rows: int | None) -> None:
    shares = assign_forwards(lengths, world, budget, most_rows)
    (number,) = {len(share) for share in shares}
    assert number >= 1
    for share in shares:
        empty, rows = sum(not forward for forward in share), sum(map(len, share))
        assert empty == max(0, number - rows)


@few
@given(batches, workers, most)
def test_workers_get_about_the_same_tokens(lengths: list[int], world: int, most_rows: int | None) -> None:
    shares = assign_forwards(lengths, world, budget=50, most_rows=most_rows)
    loads = [sum(lengths[place] for forward in share for place in forward) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


@few
@given(batches, workers, st.integers(1, 8))
def test_where_rows_are_counted_workers_get_equally_many(lengths: list[int], world: int, most_rows: int) -> None:
    shares = assign_forwards(lengths, world, 10**9, most_rows)
    share = math.ceil(len(lengths) / world)
    assert max(sum(map(len, forwards)) for forwards in shares) <= share
    assert len(shares[0]) == max(1, math.ceil(share / most_rows))


@few
@given(batches, st.integers(50, 120))
def test_forwards_are_filled(lengths: list[int], budget: int) -> None:
    """No two forwards would fit into one: at least half of the budget is used on average."""
    loads = [sum(lengths[place] for place in forward) for forward in first_fit_decreasing(lengths, budget)]
    assert all(left + right > budget for left, right in itertools.combinations(loads, 2))


@few
@given(batches, workers)
def test_sharing_out_is_a_pure_function(lengths: list[int], world: int) -> None:
    """Workers compute it each for themselves, and must agree."""
    assert assign_forwards(lengths, world, 60) == assign_forwards(tuple(np.array(lengths).tolist()), world, 60)


def test_a_batch_is_shared_out_by_hand() -> None:
    # Longest first, each to the worker with fewer tokens: 9 and 4 to one, 7, 5 and 2 to the other; then 9, 4 | 7 + 2, 5.
    shares = assign_forwards([5, 9, 4, 7, 2], world_size=2, budget=11)
    assert shares == [[[1], [2]], [[3, 4], [0]]]


@pytest.mark.parametrize(("budget", "most_rows", "digest"), [(4000, None, "7b78306afa52e64e"), (10**9, 4, "265bbf74413ef69e")])
def test_the_shares_of_a_large_batch_stay_the_same(budget: int, most_rows: int | None, digest: str) -> None:
    """A resumed run would round differently with others: ones that are found faster must be the same ones."""
    shares = assign_forwards([row * row * 7919 % 1501 for row in range(1000)], 37, budget, most_rows)
    assert hashlib.sha256(json.dumps(shares).encode()).hexdigest().startswith(digest)


def test_workers_without_rows_keep_the_others_company() -> None:
    assert assign_forwards([5], world_size=3, budget=5) == [[[0]], [[]], [[]]]
    assert assign_forwards([5, 5, 5], world_size=2, budget=5) == [[[0], [2]], [[1], []]]


@pytest.mark.parametrize("world", [1, 2])
def test_a_row_that_no_forward_takes_is_refused_with_the_budget_that_fits(world: int) -> None:
    with pytest.raises(
        ValueError, match="tokens_per_forward: a row has 31 tokens and a forward takes 30; set it to 31 or more"
    ):
        assign_forwards([3, 31, 12], world, budget=30)
    assert assign_forwards([3, 31, 12], world, budget=31)
