"""Names, docstrings, comments and pages use the field's terms."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "pipeline", "strategies")

PROSE = {
    r"a person|persons?": "user",
    r"nobody|whoever": "no process, no key, no user, anyone who: say which",
    r"(goes|go|went|gone|going) on": "resumes, continues, keeps running",
    r"there already": "cached, exists",
    r"settles?|settled": "resolve",
    r"told|said|tells?": "reported, logged, given, passed, raised",
    r"hears?|heard": "receive",
    r"anew": "again, from scratch",
    r"the worse (answer|one|completion)": "rejected",
    r"rows that can't be used": "invalid rows",
    r"go along": "are uploaded",
}
"""Words of docstrings, comments and pages, as patterns -> what to write."""
NAMES = {
    r"places?": "index, position, path or node",
    r"told|said|tell|hear": "noted, text, message, reported",
    r"settled?": "resolve",
    r"nobody|whoever": "say which",
}
"""Parts of identifiers."""


def files(*patterns: str) -> list[Path]:
    return sorted(path for package in PACKAGES for pattern in patterns for path in (ROOT / package).rglob(pattern))


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings and comments of a module, those of attributes too; text in backticks is code or output."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def banned(text: str, patterns: dict[str, str], within: str) -> list[str]:
    return [
        f"{found.group(0)!r}: {better}" for pattern, better in patterns.items() if (found := re.search(within % pattern, text))
    ]


@pytest.mark.parametrize("path", files("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_uses_the_fields_terms(path: Path) -> None:
    prose = ((line, re.sub(r"`[^`]*`", "", text)) for line, text in prose_of(path))
    found = [(line, word) for line, text in prose for word in banned(text, PROSE, r"(?i)\b(?:%s)\b")]
    found += [(line, word) for line, name in names_of(path) for word in banned(name.lower(), NAMES, r"(?:^|_)(?:%s)(?:_|$)")]
    assert not found


@pytest.mark.parametrize(
    "path",
    [
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ],
    ids=lambda path: path.name,
)
def test_a_page_uses_the_fields_terms(path: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", path.read_text(), flags=re.DOTALL)
    assert not banned(text, PROSE, r"(?i)\b(?:%s)\b")
