"""The fenced blocks of the pages, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["PAGES", "ROOT", "Block", "blocks_of"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*?) -->\s*")
"""Stands right before a block that is only shown."""
FILE = re.compile(r"# (?P<name>[\w./-]+\.(yaml|py))(?P<goes_on>, and:)?(\s|$)")
"""First line of a block that is a file: `# recipe.yaml`; `# recipe.yaml, and:` adds to what stands in it."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Of its first line."""
    language: str
    text: str
    not_run: str | None
    """Why it is only shown, as the comment before it says."""

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> re.Match[str] | None:
        """The name of the file that it is, as its first line says."""
        return FILE.match(self.text)


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page; MyST's directives are none."""
    found, before = [], None
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and not token.info.startswith("{"):
            assert token.map is not None
            mark = NOT_RUN.fullmatch(before.content) if before is not None and before.type == "html_block" else None
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(page, token.map[0] + 2, language, token.content, mark and mark["reason"]))
        before = token
    return found
