"""The generated pictures: checkable by their pixels, reproducible, and split by what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.demo.pictures import COLOURS, SHAPES, follows_preference, picture_pairs, shown_colour, write_picture_pairs


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


def test_training_shows_every_colour_and_shape_but_not_every_one_of_a_shape() -> None:
    train, held_out = (list(map(shown, picture_pairs(side))) for side in (False, True))
    assert (len(train), len(held_out)) == (240, 60)
    assert not set(train) & set(held_out)
    assert {shape for shape, _ in train} == {shape for shape, _ in held_out} == set(SHAPES)
    assert {colour for _, colour in train} == set(COLOURS)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = write_picture_pairs(tmp_path / "a"), write_picture_pairs(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    rows = [json.loads(line) for path in first for line in path.read_text().splitlines()]
    files = [image for row in rows for image in row["images"]]
    assert len(set(files)) == 300 and not any(Path(name).is_absolute() for name in files)
    pictures = [(tmp_path / "a" / name).read_bytes() for name in files]
    assert pictures == [(tmp_path / "b" / name).read_bytes() for name in files]
    assert len(set(pictures)) == 300
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


def test_a_picture_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a picture of this module, with a shape in one of red, green"):
        shown_colour(Image.new("RGB", (8, 8), "white"))
