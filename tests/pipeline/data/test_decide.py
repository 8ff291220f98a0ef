from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.split import DUPLICATE, TO_EVAL, TO_TRAIN, decide
from pipeline.errors import UserError


def hashes(*values):
    return np.frombuffer(b"".join(int(value).to_bytes(16, "big") for value in values), dtype="V16")


def run(values, test=0, dedup=False, val=0.0, seed=1, prompts=None):
    is_test = np.arange(len(values)) >= len(values) - test
    prompts = values if prompts is None else prompts
    return decide(hashes(*values), hashes(*prompts), is_test, dedup, val, seed).tolist()


def test_the_first_of_equal_rows_stays():
    assert run([5, 3, 5, 3, 9], dedup=True) == [TO_TRAIN, TO_TRAIN, DUPLICATE, DUPLICATE, TO_TRAIN]
    assert run([5, 3, 5], dedup=False) == [TO_TRAIN] * 3


def test_test_sets_lose_what_is_trained_on():
    assert run([9, 2, 2, 7], test=2, dedup=True) == [TO_TRAIN, TO_TRAIN, DUPLICATE, TO_EVAL]


@pytest.mark.parametrize(("val", "number"), [(0.2, 20), (7, 7), (0.001, 1), (1, 1)])
def test_size_of_the_split(val, number):
    assert run(range(100), val=val).count(TO_EVAL) == number


def test_the_split_depends_on_seed_and_content_only():
    first = run(range(100), val=10, seed=1)
    assert first == run(range(100), val=10, seed=1)
    assert first != run(range(100), val=10, seed=2)
    assert first == run(range(99, -1, -1), val=10, seed=1)[::-1]


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("val", range(1, 90, 7))
def test_rows_of_one_prompt_stay_together(val, dedup):
    """Three rows each of most prompts, wherever they stand; one row stands there twice."""
    values = [*range(100), 0]
    prompts = [value % 33 for value in values]
    sides = run(values, val=val, dedup=dedup, prompts=prompts)
    kept = [(prompt, side) for prompt, side in zip(prompts, sides, strict=True) if side != DUPLICATE]
    assert len({prompt for prompt, _ in kept}) == len(set(kept))
    assert val <= sides.count(TO_EVAL) <= val + 4


def test_a_split_that_leaves_nothing():
    with pytest.raises(UserError, match="val_set_size: 3 takes 3 of 3 rows and leaves none to train on"):
        run(range(3), val=3)
    with pytest.raises(UserError, match=r"val_set_size: 1 takes 2 of 2 rows .* \(rows of one prompt are on one side\)"):
        run(range(2), val=1, prompts=[7, 7])
    with pytest.raises(UserError, match="val_set_size: 5 takes 5 of 3 rows"):
        run(range(3), val=5)
