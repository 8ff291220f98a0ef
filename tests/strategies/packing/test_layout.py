"""How pairs stand in a row: by hand, and as TRL's collator truncates them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.trainer.dpo_trainer import DataCollatorForPreference

from strategies.packing.layout import Segment, pack, pair_tokens

ROW = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6, 7, 8]}
SCORES = {"ref_chosen_logps": [-0.4, -0.5], "ref_rejected_logps": [-0.6, -0.7, -0.8]}


def test_one_pair() -> None:
    row = pack([pair_tokens(ROW)])
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 3, 6, 7]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert row.segments == (Segment(2, 2, 3),)
    assert row.scored_positions.tolist() == [2, 3, 4, 5, 6]
    assert row.labels.tolist() == [4, 5, 6, 7, 8]
    assert row.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert row.reference is None


def test_two_pairs_have_their_chosen_completions_first() -> None:
    other = {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11]}
    row = pack([pair_tokens(ROW), pair_tokens(other)])
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 3, 6, 7, 9, 9]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 0]]
    assert row.segments == (Segment(2, 2, 3), Segment(0, 1, 1))
    assert row.labels.tolist() == [4, 5, 10, 6, 7, 8, 11]
    assert row.scored_positions.tolist() == [2, 3, 7, 4, 5, 6, 8]
    assert row.mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]


def test_values_of_tokens_are_put_in_their_places() -> None:
    row = pack([pair_tokens(ROW)])
    assert row.unpack(torch.tensor([4, 5, 6, 7, 8])).tolist() == [[4, 5, 0], [6, 7, 8]]


def test_the_first_token_of_a_completion_without_prompt_is_predicted_by_nothing() -> None:
    row = pack([pair_tokens({**ROW, **SCORES, "prompt_ids": []})])
    assert row.input_ids.tolist() == [[4, 6, 7]]
    assert row.position_ids.tolist() == [[0, 0, 1]]
    assert row.segments == (Segment(0, 1, 2),)
    assert row.labels.tolist() == [5, 7, 8]
    assert row.mask.tolist() == [[1, 0], [1, 1]]
    assert row.reference.flatten().tolist() == pytest.approx([-0.5, 0.0, -0.7, -0.8])


@pytest.mark.parametrize("empty", ["chosen_ids", "rejected_ids"])
def test_an_empty_completion_has_no_tokens(empty: str) -> None:
    pair = pair_tokens({**ROW, empty: []})
    row = pack([pair])
    length = len(ROW["chosen_ids" if empty == "rejected_ids" else "rejected_ids"])
    assert row.input_ids.numel() == 2 + length == pair.tokens
    assert row.mask.sum(dim=1).tolist() == ([0, 3] if empty == "chosen_ids" else [2, 0])
    assert len(row.labels) == len(row.scored_positions) == length
    assert pair.sequence_tokens == 2 * 3 + length


def test_the_references_scores_follow_the_tokens() -> None:
    row = pack([pair_tokens({**ROW, **SCORES})])
    assert row.reference.dtype == torch.float32
    assert row.reference.flatten().tolist() == pytest.approx([-0.4, -0.5, 0.0, -0.6, -0.7, -0.8])
    shorter = pack([pair_tokens({**ROW, **SCORES}, max_length=4)])
    assert shorter.labels.tolist() == [4, 6]
    assert shorter.reference.flatten().tolist() == pytest.approx([-0.4, -0.6])


def test_padding_is_a_segment_of_its_own_behind_the_pairs() -> None:
    padded, plain = pack([pair_tokens(ROW)], 8, pad_token_id=99), pack([pair_tokens(ROW)])
    assert padded.input_ids.tolist() == [[*plain.input_ids[0].tolist(), 99]]
    assert padded.segments == (*plain.segments, Segment(1, 0, 0))
    assert padded.position_ids[0, -1] == 0
    for name in ("scored_positions", "labels", "mask"):
        assert torch.equal(getattr(padded, name), getattr(plain, name))
    assert pack([pair_tokens(ROW)], 7).input_ids.shape == (1, 7)


def ids(most: int) -> Any:
    return st.lists(st.integers(1, 99), max_size=most)


rows = st.fixed_dictionaries({"prompt_ids": ids(8), "chosen_ids": ids(8), "rejected_ids": ids(8)})


@settings(max_examples=300, deadline=None)
@given(rows, st.none() | st.integers(1, 18), st.sampled_from(["keep_start", "keep_end"]))
def test_a_pair_has_the_sequences_that_trls_collator_makes(row: Any, max_length: int | None, mode: str) -> None:
    """The tokens that are predicted, what predicts them, and at which position: prompts and truncation included."""
    pair = pair_tokens(row, max_length, mode)
    packed = pack([pair])
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    assert max(pair.tokens, 1) == packed.input_ids.numel()
    number = 0
    for side in (0, 1):
        sequence = theirs["input_ids"][side][theirs["attention_mask"][side].bool()]
        predicted = theirs["completion_mask"][side].bool().nonzero().flatten()
        predicted = predicted[predicted > 0]  # nothing stands before the first token
        assert list(pair.labels[side]) == sequence[predicted].tolist()
        seen = [*pair.shared, *pair.branches[side]]
        if len(predicted):
            assert seen == sequence[:-1].tolist()
        places = packed.scored_positions[number : number + len(predicted)]
        assert packed.position_ids[0, places].tolist() == (predicted - 1).tolist()
        assert packed.input_ids[0, places].tolist() == sequence[predicted - 1].tolist()
        number += len(predicted)
    assert number == len(packed.labels)


@settings(max_examples=200, deadline=None)
@given(rows, st.none() | st.integers(1, 18), st.sampled_from(["keep_start", "keep_end"]))
def test_sequences_are_counted_as_trl_counts_them(row: Any, max_length: int | None, mode: str) -> None:
    assume(row["prompt_ids"] or (row["chosen_ids"] and row["rejected_ids"]))  # a sequence has a token
    theirs = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    pair = pair_tokens(row, max_length, mode)
    assert pair.sequence_tokens == theirs["attention_mask"].sum()
