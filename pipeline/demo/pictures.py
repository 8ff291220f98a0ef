"""Generated pictures, and a preference about them that a program can check: an answer names the colour that is there.

Every picture shows one shape of one colour, at any position and of any size. The chosen answer names its colour, the rejected
one another colour. `follows_preference` compares any answer with the picture's pixels, so the effect of training can be
measured. No picture is in both splits.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "follows_preference", "names_colour", "picture_pairs", "shown_colour", "write_picture_pairs"]

SEED = 17
TRAIN, HELD_OUT = 600, 60
"""Pairs of each split."""
SIDE = 64
"""Pixels."""

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 210, 40),
    "purple": (140, 40, 160),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond")
BACKGROUNDS = ((255, 255, 255), (235, 235, 235), (210, 225, 235))
QUESTIONS = ("What colour is the {shape}?", "Which colour does the {shape} have?", "Name the colour of the {shape}.")
ANSWER = "It is {colour}."


def picture_pairs(held_out: bool, seed: int = SEED, number: int | None = None, side: int = SIDE) -> Iterator[dict[str, Any]]:
    """Yield conversational pairs with a picture in `images`, determined by the seed.

    Args:
        held_out: whether to yield held-out pairs instead of training pairs.
        number: number of pairs; that of `write_picture_pairs` when None.
        side: width and height of the pictures in pixels.
    """
    # A seed for each split, or both would draw the same pictures.
    rng = random.Random(f"{seed}-{held_out}")
    for _ in range((HELD_OUT if held_out else TRAIN) if number is None else number):
        shape = rng.choice(SHAPES)
        colour, other = rng.sample(sorted(COLOURS), 2)
        picture = _draw(shape, COLOURS[colour], rng, side)
        question = rng.choice(QUESTIONS).format(shape=shape)
        yield {
            "images": [picture],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            "chosen": [{"role": "assistant", "content": ANSWER.format(colour=colour)}],
            "rejected": [{"role": "assistant", "content": ANSWER.format(colour=other)}],
        }


def write_picture_pairs(folder: Path, seed: int = SEED, side: int = SIDE) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl`, whose `images` are paths of PNG files in `pictures/`; return their paths."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.jsonl", folder / "held_out.jsonl")
    for path, held_out in zip(paths, (False, True), strict=True):
        lines = []
        for index, pair in enumerate(picture_pairs(held_out, seed, side=side)):
            name = f"pictures/{path.stem}-{index:03d}.png"
            pair["images"][0].save(folder / name)
            lines.append(json.dumps({**pair, "images": [name]}) + "\n")
        path.write_text("".join(lines))
    return paths


def follows_preference(answer: str, picture: Image.Image | Path) -> bool:
    """Return whether `answer` names the colour that the picture shows, and no other."""
    named = {word for word in re.findall(r"[a-z]+", answer.lower()) if word in COLOURS}
    return named == {shown_colour(picture)}


def names_colour(completions: list[Any], images: list[Any] | None = None, **columns: Any) -> list[float | None]:
    """Return 1 for a completion that names the colour of its first picture and no other, else 0: a reward function.

    Args:
        completions: text, or messages of which the last one is used.
        images: pictures of each row, or paths of them; the reward of a row without any is None.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    pictures = [row[0] if row else None for row in images or [None] * len(texts)]
    return [
        None if picture is None else float(follows_preference(text, Path(picture) if isinstance(picture, str) else picture))
        for text, picture in zip(texts, pictures, strict=True)
    ]


def shown_colour(picture: Image.Image | Path) -> str:
    """Return the name of the colour of a generated picture's shape.

    Raises:
        ValueError: if no pixel has one of `COLOURS`.
    """
    image = Image.open(picture) if isinstance(picture, Path) else picture
    counts = {pixel: number for number, pixel in image.getcolors(image.width * image.height) or ()}
    found = {name: counts[pixel] for name, pixel in COLOURS.items() if pixel in counts}
    if not found:
        raise ValueError(f"expected a picture of this module, with a shape in one of {', '.join(COLOURS)}")
    return max(found, key=found.__getitem__)


def _draw(shape: str, colour: tuple[int, int, int], rng: random.Random, side: int) -> Image.Image:
    """Draw a shape of a quarter to half of the picture's width, wholly inside."""
    image = Image.new("RGB", (side, side), rng.choice(BACKGROUNDS))
    size = rng.uniform(0.25, 0.5) * side
    left, top = (rng.uniform(0, side - 1 - size) for _ in range(2))
    right, bottom, middle, centre = left + size, top + size, left + size / 2, top + size / 2
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle, top), (left, bottom), (right, bottom)], fill=colour)
    else:
        draw.polygon([(middle, top), (right, centre), (middle, bottom), (left, centre)], fill=colour)
    return image
