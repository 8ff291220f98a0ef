"""What a test costs, by its marks, and which tests make up the tiers.

`make test` runs the tier `quick`: all tests without a mark of cost, and those marked `main_job`, which share one Ray.
`make test-rest` runs the others but those of the tier `release`, which repeat at length what others show: with other seeds,
other kinds, or a benchmark's measurements. `make test-release` runs these, `make test-all` everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["COSTS", "MAIN_JOB", "RELEASE", "SECONDS", "TIERS", "costs_of", "mark", "seconds_of", "select", "tier_of"]

COSTS = {
    "ray": "uses the Ray that the tests of a process share",
    "driver": "starts a Ray of its own, in a process of its own",
    "cluster": "starts the nodes of a cluster",
    "processes": "starts processes that take seconds to start, without Ray",
    "benchmark": "runs a benchmark, at its smallest",
    "realmodel": "loads SmolLM2",
    "browser": "looks at a page in Chromium",
    "many": "tries thousands of generated cases",
    "install": "installs a package, or builds the site",
}
"""Marks, and what they stand for. A test without any is held to a budget (tests/suite/budget.py)."""
SECONDS = {
    "cluster": 100,
    "driver": 60,
    "benchmark": 20,
    "install": 20,
    "processes": 10,
    "ray": 10,
    "realmodel": 10,
    "browser": 5,
    "many": 5,
}
"""What a test of a mark takes, about: files that take long are begun first, so that no process is left with one at the end."""
TIERS = ("quick", "rest", "release")
MAIN_JOB = "main_job"
"""Mark of a test that is in the tier `quick` whatever it costs."""
RELEASE = "release"
"""Mark of a test that is run before a release only."""
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
    if item.get_closest_marker(RELEASE):
        return "release"
    return "quick" if item.get_closest_marker(MAIN_JOB) or not costs_of(item) else "rest"


def seconds_of(item: pytest.Item) -> int:
    """What a test takes, about, by the dearest of its marks; the main job comes first anyway, and counts as nothing."""
    return 0 if item.get_closest_marker(MAIN_JOB) else max(map(SECONDS.__getitem__, costs_of(item)), default=0)


def select(items: list[pytest.Item], tier: str | None) -> list[pytest.Item]:
    """Leave the tests of a tier (all where it is None) in `items`; returns those that were taken out.

    The main job's files come first, then those that take longest.
    """
    left_out = [item for item in items if tier not in (None, tier_of(item))]
    items[:] = [item for item in items if tier in (None, tier_of(item))]
    files = {item.path for item in items if item.get_closest_marker(MAIN_JOB)}
    seconds: Counter[Path] = Counter()
    for item in items:
        seconds[item.path] += seconds_of(item)
    items.sort(key=lambda item: (item.path not in files, -seconds[item.path]))
    return left_out
