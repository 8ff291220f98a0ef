"""The steps of a run: lengths as rows will have them, shares that add up to global batches, resuming."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from strategies.batch.loader import ForwardLimits, StepLoader, pair_lengths, too_long
from strategies.batch.pairs import PackedPairs, PaddedPairs, PairCollator, WorkerStep
from strategies.batch.plan import BatchPlan, packed_tokens
from strategies.packing.layout import pair_tokens
from tests.tiny import prepared_pairs

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
length = st.integers(0, 12)
PACKED = PairCollator(None, "keep_start")
PADDED = PairCollator(None, "keep_start", padding=DataCollatorForPreference(pad_token_id=0))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(length, length, length), min_size=1, max_size=5),
    st.none() | st.integers(1, 26),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_lengths_of_pairs_are_those_of_their_layout(lengths: Any, max_length: int | None, mode: str) -> None:
    """The plan counts tokens by lengths alone, without laying out a row."""
    rows = [dict(zip(COLUMNS, ([1] * number for number in three), strict=True)) for three in lengths]
    expected = [pair_tokens(row, max_length, mode).tokens for row in rows]
    assert packed_tokens(np.array(lengths), max_length, mode).tolist() == expected


@pytest.mark.parametrize("made", [list, Dataset.from_list, lambda rows: Dataset.from_list([rows[0], *rows]).select([1, 2, 3])])
def test_lengths_are_read_of_lists_and_of_datasets(made: Any) -> None:
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": []},
        {"prompt_ids": [], "chosen_ids": [3], "rejected_ids": [4, 5, 6]},
        {"prompt_ids": [1], "chosen_ids": [3, 4], "rejected_ids": [4]},
    ]
    assert pair_lengths(made(rows)).tolist() == [[2, 1, 0], [0, 1, 3], [1, 2, 1]]


def test_lengths_are_read_of_more_rows_than_a_batch_of_arrow_has() -> None:
    rows = Dataset.from_dict({name: [[1] * (row % 7) for row in range(10_005)] for name in COLUMNS})
    assert pair_lengths(rows).tolist() == [[row % 7] * 3 for row in range(10_005)]


def test_the_first_row_that_is_too_long_is_named() -> None:
    assert too_long([3, 9, 4, 9], budget=8) == 1
    assert too_long(np.array([3, 9]), budget=9) is None


def loader(
    rows: list[dict[str, Any]],
    world: int = 1,
    rank: int = 0,
    budget: int = 90,
    most_rows: int | None = None,
    size: int = 4,
    collate: PairCollator = PACKED,
    **options: Any,
) -> StepLoader:
    tokens = packed_tokens(pair_lengths(rows), None, "keep_start")
    limits = ForwardLimits(world, rank, budget, most_rows)
    return StepLoader(rows, tokens, BatchPlan(len(rows), size, seed=1), limits, collate, **options)


def counted(step: WorkerStep) -> list[int]:
    """Positions in the global batch that a worker's forwards count."""
    return [position for batch in step.batches if batch.is_real for position in batch.positions.tolist()]


@pytest.mark.parametrize(
    ("world", "budget", "most_rows", "collate"),
    [(1, 60, None, PACKED), (2, 60, None, PACKED), (3, 300, None, PACKED), (6, 90, None, PACKED), (2, 10**9, 2, PADDED)],
)
def test_the_shares_of_all_workers_are_the_global_batch(
    world: int, budget: int, most_rows: int | None, collate: PairCollator
) -> None:
    rows = prepared_pairs(10)
    everybody = [list(loader(rows, world, rank, budget, most_rows, collate=collate)) for rank in range(world)]
    for step, shares in enumerate(zip(*everybody, strict=True)):
        size = 4 if step < 2 else 2
        assert {share.global_pairs for share in shares} == {size}
        assert sorted(position for share in shares for position in counted(share)) == list(range(size))
        assert len({len(share.batches) for share in shares}) == 1


def test_a_worker_without_rows_runs_the_shortest_row_which_does_not_count() -> None:
    rows = prepared_pairs(4)
    tokens = packed_tokens(pair_lengths(rows), None, "keep_start")[BatchPlan(4, 4, seed=1).members(0, 0)]
    idle = [batch for rank in range(6) for batch in next(iter(loader(rows, 6, rank))).batches if not batch.is_real]
    assert len(idle) == 2
    for batch in idle:
        assert batch.positions.tolist() == [int(tokens.argmin())]
        assert batch.fed_tokens == tokens.min()


def test_padded_and_packed_steps_have_the_same_rows() -> None:
    rows = prepared_pairs(10)
    for packed, padded in zip(loader(rows), loader(rows, budget=10**9, most_rows=2, collate=PADDED), strict=True):
        assert sorted(counted(packed)) == sorted(counted(padded))
        assert isinstance(packed.batches[0], PackedPairs) and isinstance(padded.batches[0], PaddedPairs)
        sums = [sum(batch.sequence_tokens for batch in share.batches) for share in (packed, padded)]
        assert sums[0] == sums[1] == sum(batch.attention_mask.sum() for batch in padded.batches)
        assert packed.fed_tokens < sums[0] < padded.fed_tokens


def same_shares(left: Any, right: Any) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.global_pairs == other.global_pairs
        for first, second in zip(one.batches, other.batches, strict=True):
            assert torch.equal(first.positions, second.positions)
            assert torch.equal(first.row.input_ids, second.row.input_ids)


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_loader_that_skips_steps_goes_on_with_the_same_steps(epoch: int) -> None:
    """As the trainer resumes in the middle of an epoch."""
    rows = prepared_pairs(22)
    whole, resumed = loader(rows), loader(rows)
    whole.set_epoch(epoch)
    resumed.set_epoch(epoch)
    same_shares(list(whole)[4:], skip_first_batches(resumed, 4))


def test_collating_in_other_processes_gives_the_same_steps() -> None:
    rows = prepared_pairs(12)
    here, elsewhere = loader(rows), loader(rows, num_workers=2, prefetch_factor=1, persistent_workers=True)
    for epoch in (0, 1):
        here.set_epoch(epoch)
        elsewhere.set_epoch(epoch)
        same_shares(here, elsewhere)


def test_epochs_have_orders_of_their_own() -> None:
    steps = loader(prepared_pairs(12))
    first = [share.batches[0].row.labels.tolist() for share in steps]
    steps.set_epoch(1)
    assert [share.batches[0].row.labels.tolist() for share in steps] != first
    steps.set_epoch(0)
    assert [share.batches[0].row.labels.tolist() for share in steps] == first


@pytest.mark.parametrize("scored", ["list", "array"])
def test_padded_pairs_bring_the_references_scores_where_their_tokens_are(scored: str) -> None:
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
        {"prompt_ids": [], "chosen_ids": [6, 7, 8], "rejected_ids": [9, 10]},
    ]
    for row in rows:
        for side in ("chosen", "rejected"):
            values = [-float(token) for token in row[f"{side}_ids"]]
            row[f"ref_{side}_logps"] = values if scored == "list" else np.array(values, dtype=np.float32)
    padded = PADDED(rows, [0, 1])
    assert padded.reference.tolist() == [[0, -3, -4], [-7, -8, 0], [0, -5, 0], [-10, 0, 0]]
    packed = PACKED(rows, [0, 1])
    assert packed.reference.tolist() == [[-3, -4], [-7, -8], [-5, 0], [-10, 0]]
