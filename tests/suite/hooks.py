"""The hooks of pytest that hold the suite to its rules; `tests/conftest.py` takes them over."""

from __future__ import annotations

import gc
import signal
from typing import Any

import pytest

from tests.suite import tiers
from tests.suite.budget import Budget
from tests.suite.output import ShortFailures

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_configure", "pytest_xdist_make_scheduler"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=tiers.TIERS,
        help="that of `make test`, `make test-rest` or `make test-release`",
    )
    parser.addoption("--budget", type=float, default=10.0, help="seconds of processor time for a test without a mark of cost")


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(50_000)  # as in the command: Python's own 700 cost a fourth of what imports take
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in their background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # so that what tests start can be interrupted
    others = {tiers.MAIN_JOB: "in the tier quick, whatever it costs", tiers.RELEASE: "run before a release only"}
    for name, meaning in {**tiers.COSTS, **others}.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    for plugin in (Budget(config.getoption("--budget")), ShortFailures(config)):
        config.pluginmanager.register(plugin)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers.mark(items)
    config.hook.pytest_deselected(items=tiers.select(items, config.getoption("--tier")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files are given out so that the main job stays in one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from tests.suite.scheduling import ByFile

    return ByFile(config, log)
