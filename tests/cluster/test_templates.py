"""Templates take any value as it is, and nothing that they don't know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import templates
from cluster.templates import fill_script, fill_yaml

ODD = (
    "yes",
    "4",
    "",
    "a: b",
    "# no comment",
    "- x",
    "'\"\\",
    "two\nlines\n",
    "\t\x07\x85\u2028",
    "ü😀",
    "__TEXT__",
    "${x} {y}",
    "*a &b !c",
)


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a template, and returns its name."""

    def make(text: str) -> str:
        (tmp_path / "template").write_text(text)
        return "template"

    monkeypatch.setattr(templates, "files", lambda _: tmp_path)
    return make


@pytest.mark.parametrize("odd", ODD)
def test_odd_letters_stay_within_their_string(template: Callable[[str], str], odd: str) -> None:
    text = fill_yaml(
        template('a: "__TEXT__"\nb: ["-__TEXT__-__TEXT__", __LIST__]\nc: __NUMBER__\n'), given(text=odd, list=[odd])
    )
    assert yaml.safe_load(text) == {"a": odd, "b": [f"-{odd}-{odd}", [odd]], "c": 3}


def given(**values: Any) -> dict[str, Any]:
    return {"number": 3, **values}


def test_lines_are_indented_and_not_filled_again(template: Callable[[str], str]) -> None:
    lines = "a: |\n\n  __NUMBER__  \n   b\n# if number"
    text = fill_yaml(template("x:\n  y: |\n    __LINES__\nz: __NUMBER__\n"), given(lines=lines))
    assert yaml.safe_load(text) == {"x": {"y": f"{lines}\n"}, "z": 3}


@pytest.mark.parametrize(("text", "value"), [("a: __VALUE__\n", "yes"), ("a: __VALUE__\n", "b: c"), ('a: "__VALUE__"\n', 4)])
def test_a_template_that_does_not_quote_as_its_value_asks_is_refused(
    template: Callable[[str], str], text: str, value: Any
) -> None:
    with pytest.raises((AssertionError, yaml.YAMLError)):
        fill_yaml(template(text), {"value": value})


def test_every_placeholder_needs_a_value(template: Callable[[str], str]) -> None:
    for values in ({}, {"value": None}):
        with pytest.raises(AssertionError, match="no value for __VALUE__"):
            fill_script(template("a __VALUE__\n"), values)
        assert fill_script(template("a __VALUE|b c__ __VALUE|d__\n"), values) == "a b c d\n"
    assert fill_script(template("a __VALUE|b__\n"), {"value": "x"}) == "a x\n"
    with pytest.raises(KeyError, match="missing"):
        fill_script(template("a  # if missing\n"), {})


@pytest.mark.parametrize("value", [None, "", 0, False, []])
def test_lines_without_their_value_go_with_what_is_below_them(template: Callable[[str], str], value: Any) -> None:
    text = "a:\n  b: 1  # if value\n  c:  # if value\n    - d: __VALUE__\n      e: 2\n  f: 3\ng: 4  # if number\n"
    assert fill_yaml(template(text), given(value=value)) == "a:\n  f: 3\ng: 4\n"
    assert yaml.safe_load(fill_yaml(template(text), given(value=5)))["a"] == {"b": 1, "c": [{"d": 5, "e": 2}], "f": 3}
