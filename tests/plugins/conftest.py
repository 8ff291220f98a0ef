"""Registries that are as they were after each test, and a folder for modules."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.transforms import registry as types
from strategies import callbacks, plugins
from strategies.losses import table as loss_traits
from strategies.methods import registry as strategies

Write = Callable[[str, str], str]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Forget what a test registers and imports."""
    dicts: list[dict[Any, Any]] = [
        loss_traits.LOSSES,
        strategies.STRATEGIES,
        strategies.STRATEGY_KEYS,
        callbacks.CALLBACKS,
        plugins._LOADED,
        *types.FACTORIES.values(),
        *types._OUTSIDE.values(),
    ]
    kept, modules, path = [dict(one) for one in dicts], set(sys.modules), list(sys.path)
    yield
    for one, before in zip(dicts, kept, strict=True):
        one.clear()
        one.update(before)
    for name in [name for name in sys.modules.keys() - modules if name.startswith(("my_", "prefray_example"))]:
        del sys.modules[name]
    sys.path[:], plugins._FOLDERS[:] = path, []


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """`write(name, code)`: a module in the current directory, which is a folder of its own; returns its path."""
    monkeypatch.chdir(tmp_path)

    def module(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return str(tmp_path / f"{name}.py")

    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outside package on the path, not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "prefray_example"))
    plugins.load_plugins(["prefray_example"])
