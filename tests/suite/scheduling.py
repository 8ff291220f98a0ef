"""Which process runs which tests, under xdist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.suite.tiers import MAIN_JOB

__all__ = ["ByFile"]

MARKED = re.compile(rf"^\s*(?:@|pytestmark = |return ).*\bpytest\.mark\.{MAIN_JOB}\b", re.MULTILINE)
"""How a file marks tests of the main job."""


class ByFile(LoadScopeScheduling):
    """Gives each process of tests a file at a time, and in the tier `quick` all files of the main job to one: it has the Ray.

    The process that schedules knows tests by their ids only, so files are told by their text (xdist's own groups are names that
    it adds to ids, which pytest 9.2 doesn't let it).
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._root, self._tier = config.rootpath, config.getoption("--tier")
        self._is_main: dict[str, bool] = {}

    def _reschedule(self, node: Any) -> None:
        """Give a process its next file when it has one test left, which it can't begin without knowing the one after.

        xdist itself does so when two are left: the file then waits for a test that may take minutes, while other processes end.
        """
        if not self.workqueue or self._pending_of(self.assigned_work[node]) <= 1:
            super()._reschedule(node)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file not in self._is_main:
            text = Path(self._root, file).read_text(encoding="utf-8")
            self._is_main[file] = self._tier == "quick" and MARKED.search(text) is not None
        return MAIN_JOB if self._is_main[file] else file
