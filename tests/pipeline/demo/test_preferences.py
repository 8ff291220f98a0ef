"""The demonstration's preference set: checkable, reproducible, and split by subject."""

from __future__ import annotations

from pathlib import Path

from pipeline.demo.preferences import follows_preference, held_out_prompts, preference_pairs, write_preferences


def question(pair: dict) -> str:
    return pair["prompt"][0]["content"]


def test_every_pair_is_what_the_check_says() -> None:
    for held_out in (False, True):
        for pair in preference_pairs(held_out):
            assert follows_preference(pair["chosen"][0]["content"])
            assert not follows_preference(pair["rejected"][0]["content"])


def test_a_few_hundred_questions_and_none_on_both_sides() -> None:
    train, held_out = ({question(pair) for pair in preference_pairs(side)} for side in (False, True))
    assert (len(train), len(held_out)) == (240, 60)
    assert not train & held_out
    assert set(held_out_prompts()) == held_out
    assert not any("koala" in text for text in train)
    assert any("koala" in text for text in held_out)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_preferences(tmp_path / "a"), write_preferences(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    other = write_preferences(tmp_path / "c", seed=1)
    assert other[0].read_bytes() != first[0].read_bytes()
