"""The generated pictures: checkable by their pixels, reproducible, and none in both splits."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.demo.pictures import (
    COLOURS,
    SHAPES,
    follows_preference,
    names_colour,
    picture_pairs,
    shown_colour,
    write_picture_pairs,
)


def shown(pair: dict[str, Any]) -> tuple[str, str]:
    """Shape and colour: the one by the question, the other by the pixels."""
    question = pair["prompt"][0]["content"][1]["text"]
    return next(shape for shape in SHAPES if shape in question), shown_colour(pair["images"][0])


def test_every_pair_is_what_the_check_says() -> None:
    for held_out in (False, True):
        for pair in picture_pairs(held_out):
            assert follows_preference(pair["chosen"][0]["content"], pair["images"][0])
            assert not follows_preference(pair["rejected"][0]["content"], pair["images"][0])
            assert [part["type"] for part in pair["prompt"][0]["content"]] == ["image", "text"]


def test_every_colour_of_every_shape_and_no_picture_in_both_splits() -> None:
    pictures = []
    for held_out, number in ((False, 600), (True, 60)):
        pairs = list(picture_pairs(held_out))
        assert len(pairs) == number
        assert {shape for shape, _ in map(shown, pairs)} == set(SHAPES)
        pictures.append({pair["images"][0].tobytes() for pair in pairs})
        if not held_out:
            assert set(map(shown, pairs)) == set(product(SHAPES, COLOURS))
    assert not pictures[0] & pictures[1]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_picture_pairs(tmp_path / "a"), write_picture_pairs(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    rows = [json.loads(line) for path in first for line in path.read_text().splitlines()]
    files = [image for row in rows for image in row["images"]]
    assert len(set(files)) == 660 and not any(Path(name).is_absolute() for name in files)
    pictures = [(tmp_path / "a" / name).read_bytes() for name in files]
    assert pictures == [(tmp_path / "b" / name).read_bytes() for name in files]
    assert len(set(pictures)) == 660
    assert follows_preference(rows[0]["chosen"][0]["content"], tmp_path / "a" / files[0])
    other = write_picture_pairs(tmp_path / "c", seed=1)
    assert other[0].read_bytes() != first[0].read_bytes()


def test_an_answer_names_the_colour_and_no_other() -> None:
    picture = next(picture_pairs(held_out=False, number=1, side=384))["images"][0]
    assert picture.size == (384, 384)
    right = shown_colour(picture)
    wrong = next(colour for colour in COLOURS if colour != right)
    assert follows_preference(f"{right.upper()}!", picture)
    for answer in ("", f"{right} or {wrong}", f"it is {right}ish", f"not {wrong}"):
        assert not follows_preference(answer, picture), answer


def test_the_check_as_a_reward_function(tmp_path: Path) -> None:
    pairs = list(picture_pairs(held_out=True, number=2))
    pairs[0]["images"][0].save(tmp_path / "first.png")
    images = [[str(tmp_path / "first.png")], pairs[1]["images"]]
    assert names_colour([pair["chosen"] for pair in pairs], images, prompts=["", ""]) == [1.0, 1.0]
    assert names_colour([pair["rejected"][0]["content"] for pair in pairs], images) == [0.0, 0.0]
    chosen = [pair["chosen"] for pair in pairs]
    assert names_colour([*chosen, "It is red."], [*images, []]) == [1.0, 1.0, None]
    assert names_colour(chosen) == names_colour(chosen, [None, []]) == [None, None]


def test_a_picture_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a picture of this module, with a shape in one of red, green"):
        shown_colour(Image.new("RGB", (8, 8), "white"))
