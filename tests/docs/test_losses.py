"""What the page says of the losses is what their docstrings and their table say."""

from __future__ import annotations

import inspect

import pytest

from docs._ext.loss_sections import COMMAND, PAGE, with_sections
from strategies.losses.table import LOSSES, loss_types

TEXT = PAGE.read_text()


def test_the_page_is_what_the_code_says() -> None:
    assert with_sections(TEXT) == TEXT, f"docs/strategies.md lags behind the losses; run: .venv/bin/{COMMAND}"


def test_the_page_has_every_loss() -> None:
    sections = [line[5:-1] for line in TEXT.splitlines() if line.startswith("### `")]
    assert sorted(sections) == sorted(loss_types())
    for name in LOSSES.keys() - set(loss_types()):
        assert f"{COMMAND} writes {name} -->" in TEXT


@pytest.mark.parametrize("name", LOSSES)
def test_a_docstring_has_formula_and_paper(name: str) -> None:
    first, _, text = (inspect.getdoc(LOSSES[name].load()) or "").partition("\n\n")
    assert first.startswith("Return ") and "shape (B,)" in first
    assert text.splitlines().count("$$") == 2 and LOSSES[name].paper in text
