"""Images of the documentation: small, shown somewhere, and the recording is of the commands that its script names."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.recording import COMMANDS, TARGET

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "docs" / "images").iterdir())
MOST = 500_000
"""Bytes."""


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_an_image_is_small_and_shown(image: Path) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert image.stat().st_size < MOST
    assert any(f"images/{image.name})" in page.read_text(encoding="utf-8") for page in pages)


def test_the_recording_is_of_its_commands() -> None:
    text = TARGET.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.findtext("{*}title") == " and ".join(COMMANDS)
    assert "In short," in text and "healthy" in text, "what the data teach, and what was found in the run"
    assert not re.search(r"/(home|root|tmp|Users|work|builds?)/", text), "no path of the machine that recorded it"
