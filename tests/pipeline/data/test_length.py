from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.length import fit
from pipeline.data.tokenise import Tokenised


def row(prompt, *completions):
    return Tokenised(np.arange(prompt), tuple(np.asarray(ids) for ids in completions))


def test_the_longest_completion_counts():
    fits = row(3, [1, 2], [3, 4, 5])
    assert fits.length == 6
    assert fit(fits, 6, "drop") is fits
    assert fit(fits, 5, "drop") is None


def test_truncate_cuts_the_end_of_completions_only():
    cut = fit(row(3, [1, 2], [3, 4, 5, 6]), 5, "truncate")
    assert len(cut.prompt) == 3
    assert [ids.tolist() for ids in cut.completions] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("limit", [2, 3])
def test_truncate_drops_where_no_answer_is_left(limit):
    assert fit(row(3, [1], [2, 3]), limit, "truncate") is None


def test_truncate_drops_pairs_that_become_equal():
    assert fit(row(3, [1, 2], [1, 3]), 4, "truncate") is None
    assert fit(row(3, [1, 2]), 4, "truncate").completions[0].tolist() == [1]
