"""A test without a mark of cost takes little time: a run in which one didn't fails.

Time is that of processors, of the test's process and of those that it has started and waited for, so that a busy machine
changes nothing. What fixtures of modules and sessions take belongs to no single test and isn't counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest

from tests.suite.tiers import costs_of

__all__ = ["Budget"]

PROPERTY = "processor seconds"
PRELOADED = ("strategies.preload", "trl")
"""What the first test that needs it would be charged for."""


def processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Budget:
    """Measures in the processes that run tests; judges where their reports come together.

    Args:
        seconds: what an unmarked test may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spent: dict[str, float] = {}
        self._fixtures = 0.0
        self._depth = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if "torch" in sys.modules and not session.config.option.collectonly:
            with suppress(ImportError):  # tests will say it
                for name in PRELOADED:
                    import_module(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        before, self._depth = processor_time(), self._depth + 1
        try:
            return (yield)
        finally:
            self._depth -= 1
            if not self._depth:
                self._fixtures += processor_time() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[Any]:
        return (yield from self._measured(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[Any]:
        return (yield from self._measured(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[Any]:
        if nextitem is None or nextitem.path != item.path:  # fixtures of modules and sessions end here too
            return (yield)
        return (yield from self._measured(item))

    def _measured(self, item: pytest.Item) -> Iterator[Any]:
        if costs_of(item):
            return (yield)
        before, self._fixtures = processor_time(), 0.0
        try:
            return (yield)
        finally:
            item.user_properties.append((PROPERTY, processor_time() - before - self._fixtures))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # the last one, with the times of all three
            self._spent[report.nodeid] = sum(value for name, value in report.user_properties if name == PROPERTY)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self._over_budget() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return (yield)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if found := self._over_budget():
            terminalreporter.section(f"unmarked tests that took {self._seconds:g} s of processor time or more", red=True)
            for nodeid, seconds in sorted(found.items(), key=lambda entry: -entry[1]):
                terminalreporter.line(f"{seconds:6.1f} s  {nodeid}")
            terminalreporter.line("Make them cheaper, or mark what they cost (tests/suite/tiers.py).")

    def _over_budget(self) -> dict[str, float]:
        return {nodeid: seconds for nodeid, seconds in self._spent.items() if seconds >= self._seconds}
