"""What a failing test says fits a screen: long messages, tracebacks and captured output are cut in their middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["ShortFailures", "cut"]

MESSAGE_LINES = 24
CAPTURED_LINES = 12
FRAMES = 6
COLUMNS = 240
FAIL = "E   "
"""How pytest begins a line of a message."""


def cut(text: str, lines: int, mark: str = "") -> str:
    """The first and the last lines of a text, so many in all, none of them longer than `COLUMNS`.

    Args:
        mark: what the line begins with that says how many are left out.
    """
    found = [line if len(line) <= COLUMNS else f"{line[:COLUMNS]} ..." for line in text.splitlines()]
    if len(found) > lines:
        first = lines // 3
        found[first : len(found) - (lines - first)] = [f"{mark}... {len(found) - lines} lines ..."]
    return "\n".join(found)


class ShortFailures:
    """Cuts what reports of failures hold; `-vv` leaves it whole."""

    def __init__(self, config: pytest.Config) -> None:
        self._is_whole = config.get_verbosity() >= 2

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[Any]:
        report = yield
        if report.failed and not self._is_whole:
            report.sections = [(name, cut(text, CAPTURED_LINES)) for name, text in report.sections]
            for traceback, *_ in getattr(report.longrepr, "chain", ()):
                _shorten(traceback)
        return report


def _shorten(traceback: Any) -> None:
    entries = traceback.reprentries
    if len(entries) > FRAMES:
        traceback.extraline = f"({len(entries) - FRAMES} frames in the middle are left out; -vv shows them)"
        entries[FRAMES // 2 : len(entries) - FRAMES // 2] = []
    for entry in entries:
        source = [line for line in entry.lines if not line.startswith(FAIL[0])]
        message = "\n".join(line for line in entry.lines if line.startswith(FAIL[0]))
        entry.lines = [*source, *cut(message, MESSAGE_LINES, FAIL).splitlines()]
