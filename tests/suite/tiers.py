"""What a test costs, by its marks, and which tests make up the two tiers.

`make test` runs the tier `quick`: all tests without a mark of cost, and those marked `main_job`, which share one Ray.
`make test-rest` runs the others, `make test-all` everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

__all__ = ["COSTS", "TIERS", "ByFile", "costs_of", "mark", "select", "tier_of"]

COSTS = {
    "ray": "uses the Ray that the tests of a process share",
    "driver": "starts a Ray of its own, in a process of its own",
    "cluster": "starts the nodes of a cluster",
    "processes": "starts several processes that import torch or pytest, without Ray",
    "long": "computes for more seconds than the budget of an unmarked test",
    "realmodel": "loads SmolLM2",
    "browser": "looks at a page in Chromium",
    "install": "installs a package, or builds the site",
}
"""Marks, and what they stand for. A test without any is held to a budget (tests/suite/budget.py)."""
TIERS = ("quick", "rest")
MAIN_JOB = "main_job"
"""Mark of a test that is in the tier `quick` whatever it costs."""
OF_FIXTURES = {"ray_session": "ray", "two_processes": "processes", "cluster": "cluster"}
"""Fixtures whose tests have a mark by themselves."""


def mark(items: Iterable[pytest.Item]) -> None:
    """Give tests the marks that their fixtures stand for."""
    for item in items:
        for fixture in OF_FIXTURES.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(OF_FIXTURES[fixture])


def costs_of(item: pytest.Item) -> set[str]:
    """The marks of cost that a test has."""
    return COSTS.keys() & {mark.name for mark in item.iter_markers()}


def tier_of(item: pytest.Item) -> str:
    """The tier that a test belongs to."""
    return "quick" if item.get_closest_marker(MAIN_JOB) or not costs_of(item) else "rest"


def select(items: list[pytest.Item], tier: str | None) -> list[pytest.Item]:
    """Leave the tests of a tier (all where it is None) in `items`, the main job first; returns those that were taken out."""
    left_out = [item for item in items if tier not in (None, tier_of(item))]
    items[:] = [item for item in items if tier in (None, tier_of(item))]
    files = {item.path for item in items if item.get_closest_marker(MAIN_JOB)}
    items.sort(key=lambda item: item.path not in files)
    return left_out


class ByFile(LoadScopeScheduling):
    """Gives each process of tests a file at a time, and files with tests of the main job to one process: it has one Ray.

    What schedules knows tests by their ids, so files are told by their text.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self._root, self._tier = config.rootpath, config.getoption("--tier")
        self._is_main: dict[str, bool] = {}

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file not in self._is_main:
            self._is_main[file] = f"mark.{MAIN_JOB}" in Path(self._root, file).read_text(encoding="utf-8")
        return MAIN_JOB if self._is_main[file] and self._tier == "quick" else file
