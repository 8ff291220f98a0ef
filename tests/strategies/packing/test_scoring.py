"""Scores of completions under one model: what the whole logits of each sequence alone would say."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from strategies.inference.scoring import PairScorer
from tests.laws.runs import FAMILIES, opinionated
from tests.tiny import prepared_pairs

WITHOUT_PROMPT = {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}
SHORTEST = {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}
ROWS = [*prepared_pairs(7), WITHOUT_PROMPT, {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6, 7]}]
SLIDING = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}


def expected(model: Any, row: Any, name: str) -> np.ndarray:
    prompt, completion = row["prompt_ids"], row[name]
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    places = range(len(prompt), ids.shape[1])
    return np.array([logps[place - 1, ids[0, place]].item() if place else 0.0 for place in places])


@pytest.mark.parametrize("budget", [90, 1000])
@pytest.mark.parametrize(
    ("family", "keys", "packed"),
    [*((family, {}, True) for family in FAMILIES), ("qwen", SLIDING, False)],
    ids=[*FAMILIES, "sliding window"],
)
def test_scores_are_those_of_each_sequence_alone(family: str, keys: dict[str, Any], packed: bool, budget: int) -> None:
    model = opinionated(family, **keys).eval()
    untouched = copy.deepcopy(model)
    scorer = PairScorer(model, budget)
    scores = scorer.score(ROWS)
    assert (scorer.padded_because is None) is packed
    assert scorer.forwards == (len(ROWS) if not packed else 1 if budget == 1000 else scorer.forwards)
    for row, both in zip(ROWS, scores, strict=True):
        for name, found in zip(("chosen_ids", "rejected_ids"), both, strict=True):
            assert found.dtype == np.float32 and found.shape == (len(row[name]),)
            np.testing.assert_allclose(found, expected(untouched, row, name), rtol=1e-5, atol=1e-5)


def test_small_budgets_take_more_forwards() -> None:
    scorer = PairScorer(opinionated().eval(), 60)
    scorer.score(ROWS)
    assert 1 < scorer.forwards <= len(ROWS)
    done = scorer.forwards
    scorer.score(ROWS[:1])
    assert scorer.forwards == done + 1


@pytest.mark.parametrize("keys", [{}, SLIDING], ids=["packed", "apart"])
def test_a_completion_of_one_token_without_prompt_is_predicted_by_nothing(keys: dict[str, Any]) -> None:
    """Alone in a forward too, which then has no token at all."""
    scorer = PairScorer(opinionated("qwen", **keys).eval(), 60)
    for rows in ([SHORTEST], [SHORTEST, WITHOUT_PROMPT]):
        assert [scores.tolist() for scores in scorer.score(rows)[0]] == [[0.0], [0.0]]


def test_no_rows_have_no_scores() -> None:
    assert PairScorer(opinionated().eval(), 60).score([]) == []


@pytest.mark.parametrize("keys", [{}, SLIDING], ids=["packed", "apart"])
def test_a_row_that_is_too_long_is_refused_with_the_budget_that_fits(keys: dict[str, Any]) -> None:
    scorer = PairScorer(opinionated("qwen", **keys).eval(), 20)
    message = "tokens_per_forward: a row has 23 tokens and a forward takes 20; set it to 23 or more"
    with pytest.raises(ValueError, match=message):
        scorer.score([{"prompt_ids": [1] * 4, "chosen_ids": [2] * 10, "rejected_ids": [3] * 10}])


def test_autocast_scores_are_those_of_the_model_under_autocast() -> None:
    """Rounded to 8 bits in every product: equal up to what the order of the sums does, some hundredths of a nat."""
    model = opinionated().eval()
    exact = PairScorer(copy.deepcopy(model), 1000).score(ROWS)
    rounded = PairScorer(model, 1000, torch.bfloat16).score(ROWS)
    for left, right in zip(exact, rounded, strict=True):
        for one, other in zip(left, right, strict=True):
            assert other.dtype == np.float32
            np.testing.assert_allclose(other, one, atol=0.15)
    assert any(
        (one != other).any() for left, right in zip(exact, rounded, strict=True) for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("family", [*FAMILIES])
def test_mean_hidden_states_are_the_same_packed_and_apart(family: str) -> None:
    model = opinionated(family).eval()
    untouched = copy.deepcopy(model)
    rows = [*ROWS, SHORTEST]
    scorer = PairScorer(model, 1000, keep_hidden=True)
    without = PairScorer(opinionated(family).eval(), 1000)
    packed, plain = scorer.score(rows), without.score(rows)
    assert scorer.forwards == 1 and without.hidden == []
    for with_states, alone in zip(packed, plain, strict=True):
        assert all(map(np.array_equal, with_states, alone))
    for row, states in zip(rows, scorer.hidden, strict=True):
        for name, found in (("chosen_ids", states.chosen), ("rejected_ids", states.rejected)):
            assert found.dtype == np.float16
            np.testing.assert_allclose(found, mean_state(untouched, row, name), rtol=2e-3, atol=2e-3)


def test_mean_hidden_states_of_padded_pairs() -> None:
    model = opinionated("qwen", **SLIDING).eval()
    untouched = copy.deepcopy(model)
    scorer = PairScorer(model, 1000, keep_hidden=True)
    scorer.score([*ROWS, SHORTEST])
    assert scorer.padded_because is not None
    for row, states in zip([*ROWS, SHORTEST], scorer.hidden, strict=True):
        for name, found in (("chosen_ids", states.chosen), ("rejected_ids", states.rejected)):
            np.testing.assert_allclose(found, mean_state(untouched, row, name), rtol=2e-3, atol=2e-3)


def mean_state(model: Any, row: Any, name: str) -> np.ndarray:
    """Over the positions that predict the completion's tokens, of the sequence alone."""
    ids = torch.tensor([[*row["prompt_ids"], *row[name]]])
    with torch.no_grad():
        states = model.base_model(input_ids=ids).last_hidden_state[0]
    places = slice(max(len(row["prompt_ids"]) - 1, 0), ids.shape[1] - 1)
    return states[places].mean(dim=0).numpy() if ids.shape[1] > 1 else np.zeros(states.shape[1])
