"""What a failing test says fits a screen: long messages, tracebacks and captured output are cut in their middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

__all__ = ["ShortFailures", "cut"]

MESSAGE_LINES = 24
CAPTURED_LINES = 12
FRAMES = 6
LINKS = 2
"""Of a chain of exceptions: the first and the last."""
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
        return self._shortened((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Iterator[Any]:
        return self._shortened((yield))

    def _shortened(self, report: Any) -> Any:
        if not report.failed or self._is_whole:
            return report
        report.sections = [(name, cut(text, CAPTURED_LINES)) for name, text in report.sections]
        if hasattr(report.longrepr, "longrepr"):  # of a file that can't be collected
            report.longrepr.longrepr = cut(report.longrepr.longrepr, MESSAGE_LINES)
        chain = getattr(report.longrepr, "chain", [])
        if len(chain) > LINKS:
            chain[1 : len(chain) - LINKS + 1] = []
        for traceback, crash, _ in chain:
            _shorten(traceback, MESSAGE_LINES // len(chain), FRAMES // len(chain))
            if crash is not None:
                crash.message = crash.message.partition("\n")[0][:COLUMNS]
        return report


def _shorten(traceback: Any, lines: int, frames: int) -> None:
    entries = traceback.reprentries
    if len(entries) > frames:
        traceback.extraline = f"({len(entries) - frames} frames in the middle are left out; -vv shows them)"
        entries[frames // 2 : len(entries) - (frames - frames // 2)] = []
    for entry in entries:
        source = [line for line in entry.lines if not line.startswith(FAIL)]
        message = "\n".join(line for line in entry.lines if line.startswith(FAIL))
        entry.lines = [*source, *cut(message, lines, FAIL).splitlines()]
