from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.tokenize import Tokenised
from pipeline.data.truncation import truncate, truncate_all


def row(prompt, *completions):
    return Tokenised(np.arange(prompt), tuple(np.asarray(ids) for ids in completions))


def test_the_longest_completion_counts():
    fits = row(3, [1, 2], [3, 4, 5])
    assert fits.length == 6
    assert truncate(fits, 6, "drop") is fits
    assert truncate(fits, 5, "drop") is None


def test_truncate_cuts_the_end_of_completions_only():
    cut = truncate(row(3, [1, 2], [3, 4, 5, 6]), 5, "truncate")
    assert len(cut.prompt) == 3
    assert [ids.tolist() for ids in cut.completions] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("limit", [2, 3])
def test_truncate_drops_where_no_answer_is_left(limit):
    assert truncate(row(3, [1], [2, 3]), limit, "truncate") is None


def test_truncate_drops_pairs_that_become_equal():
    assert truncate(row(3, [1, 2], [1, 3]), 4, "truncate") is None
    assert truncate(row(3, [1, 2]), 4, "truncate").completions[0].tolist() == [1]


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_a_prompt_alone_is_never_cut(strategy):
    assert truncate(prompt := row(3), 3, strategy) is prompt
    assert truncate(row(3), 2, strategy) is None


def test_halves_fit_each_for_itself():
    chosen, rejected = row(3, [1, 2]), row(3, [1, 3, 4])
    assert truncate_all([chosen, rejected], 5, "drop") == [chosen, None]
    assert truncate_all([chosen, row(3, [1, 2, 4])], 5, "truncate") == [None, None]
    assert [len(half.completions[0]) for half in truncate_all([chosen, rejected], 5, "truncate")] == [2, 2]
    assert truncate_all([chosen, chosen], 5, "truncate") == [chosen, chosen]
