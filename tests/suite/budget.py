"""A test without a mark of cost takes little time: a run in which one didn't fails.

Time is that of processors, of the test's process and of those that it has started, so that a busy machine changes nothing.
A fixture of a module is held to the same budget by itself; what fixtures of the session take isn't counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.suite.tiers import costs_of

__all__ = ["Budget"]

PROPERTY = "processor seconds"
PRELOADED = ("strategies.preload", "trl")
"""What the first test that needs it would be charged for."""


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds of this process and, on Linux, of the children that run: pid -> seconds."""

    own: float
    ended_children: float
    children: dict[str, float]

    @classmethod
    def now(cls) -> ProcessorTime:
        times = os.times()
        children = {pid: _time_of(pid) for pid in _children()}
        return cls(times.user + times.system, times.children_user + times.children_system, children)

    def since(self, start: ProcessorTime) -> float:
        """Seconds since then. Children of before are others' (Ray's nodes count a worker's whole life when it ends)."""
        started = sum(seconds for pid, seconds in self.children.items() if pid not in start.children)
        ended_others = sum(seconds for pid, seconds in start.children.items() if pid not in self.children)
        ended = max(0.0, self.ended_children - start.ended_children - ended_others)
        return self.own - start.own + started + ended


def _children() -> list[str]:
    return [pid for file in Path("/proc/self/task").glob("*/children") for pid in _read(file).split()]


def _time_of(pid: str) -> float:
    """Of a process that runs, and of its own children that have ended."""
    fields = _read(Path("/proc", pid, "stat")).rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _read(file: Path) -> str:
    with suppress(OSError):  # it has ended meanwhile
        return file.read_text()
    return ""


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
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        before, self._depth = ProcessorTime.now(), self._depth + 1
        try:
            return (yield)
        finally:
            self._depth -= 1
            if not self._depth:
                spent = ProcessorTime.now().since(before)
                self._fixtures += spent
                if fixturedef.scope != "session" and not costs_of(item := request._pyfuncitem):
                    item.user_properties.append((f"{PROPERTY} of {fixturedef.argname}", spent))

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
        before, self._fixtures = ProcessorTime.now(), 0.0
        try:
            return (yield)
        finally:
            item.user_properties.append((PROPERTY, ProcessorTime.now().since(before) - self._fixtures))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # the last one, with the times of all three
            for name, seconds in report.user_properties:
                if name.startswith(PROPERTY):
                    spender = f"{report.nodeid}{name.removeprefix(PROPERTY)}"
                    self._spent[spender] = self._spent.get(spender, 0.0) + seconds

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
