"""Plugins: external modules that register losses, strategies, callbacks and dataset types. Loads without torch.

They are named by `plugins:` in a config, or by installed packages as entry points of the group `prefray.plugins`. They must be
loaded in every process that looks up their names: where a config is read, and where it is unpickled.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from strategies.outside import OutsideError, RegistrationError, registrations

__all__ = ["GROUP", "PluginError", "Plugins", "installed_plugins_only", "load_plugins"]

GROUP = "prefray.plugins"
"""Group of entry points; the value of each is a module."""

_LOADED: dict[str, bytes | None] = {}
"""Module -> content of its file when it was imported; None for one without a file."""
_FOLDERS: list[str] = []
"""Folders searched for this run's modules, besides installed packages."""


_NAMED_TOO = ContextVar("_NAMED_TOO", default=True)
"""Whether modules named by a config are loaded."""


@contextmanager
def installed_plugins_only() -> Iterator[None]:
    """Context in which no module named by a config is loaded, for inspecting configs that are not trusted."""
    token = _NAMED_TOO.set(False)
    try:
        yield
    finally:
        _NAMED_TOO.reset(token)


class PluginError(OutsideError):
    """A plugin can't be loaded. `path` is the config key that names it, empty for an installed one."""

    def __init__(self, path: str, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(path, problem)  # as unpickling calls it

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


@dataclass(frozen=True)
class Plugins:
    """The plugins of a run, for other processes to load."""

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """Search folders besides installed packages."""

    @classmethod
    def of(cls, cfg: Any) -> Plugins:
        """Return the plugins of a config that was read or unpickled in this process."""
        return cls(tuple(getattr(cfg, "plugins", None) or ()), tuple(_FOLDERS))

    def load(self) -> None:
        """Load them, as `load_plugins`."""
        load_plugins(self.modules, self.folders)


def load_plugins(modules: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Import installed plugins and these modules; within `installed_plugins_only`, `modules` are not loaded.

    Args:
        modules: dotted names.
        folders: additional search folders; the current directory if empty. They are appended to `sys.path` permanently, so
            that installed packages come first.

    Raises:
        PluginError: for a module that can't be imported, registers nothing, or whose file has changed since it was imported.
    """
    modules = modules if _NAMED_TOO.get() else ()
    if modules:
        for folder in folders or [str(Path.cwd())]:
            _add_folder(folder)
    for point in _installed(tuple(sys.path)):
        package = f" of the package {point.dist.name}" if point.dist is not None else ""
        _load(point.module, "", f"the installed plugin {point.name!r}{package}: ", "; mend the package, or uninstall it")
    for index, name in enumerate(modules):
        _check_name(name, f"plugins.{index}")
        _load(name, f"plugins.{index}", "", f"; modules are looked for in {', '.join(_FOLDERS)} and among the installed ones")


def _add_folder(folder: str) -> None:
    if folder not in _FOLDERS:
        _FOLDERS.append(folder)
    if folder not in sys.path:
        sys.path.append(folder)


# Cached per path, as it reads the metadata of every installed package.
@cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points found on a `sys.path`, sorted by name."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda point: point.name))


def _check_name(name: str, path: str) -> None:
    if name.partition(".")[0] == "axolotl":
        raise PluginError(path, f"{name!r} is a plugin of Axolotl's and means nothing here; remove it")
    if name.endswith(".py") or "/" in name:
        raise PluginError(path, f"expected the name of a module, got the file {name!r}; write {Path(name).stem}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise PluginError(path, f"expected the dotted name of a module, such as my_plugins, got {name!r}")


def _load(name: str, path: str, whose: str, remedy: str) -> None:
    """Import a plugin, unless it is loaded.

    Args:
        path: config key that names it.
        whose: its origin, if no key names it.
        remedy: of a failed import.
    """
    if name in _LOADED and name in sys.modules:
        # Not reloaded: objects of the former version would stay in use wherever they were imported.
        if _LOADED[name] != _content(sys.modules[name]):
            problem = f"{name} has changed since it was imported; restart Python (in a notebook: the kernel) to use the new one"
            raise PluginError(path, f"{whose}{problem}")
        return
    is_new, before = name not in sys.modules, registrations()
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise PluginError(path, f"{whose}can't import {name}: {error}{remedy}") from error
    except RegistrationError as error:
        raise PluginError(path, f"{whose}{name}: {error}") from error
    # SystemExit: a script without a main guard must not end the process in silence.
    except (Exception, SystemExit) as error:
        raise PluginError(path, f"{whose}{name} raised {_described(error)} when it was imported") from error
    # A module that something else has imported already registered then.
    if is_new and registrations() == before:
        for part in [part for part in sys.modules if part == name or part.startswith(f"{name}.")]:
            del sys.modules[part]  # so that the next attempt imports them again
        raise PluginError(
            path,
            f"{whose}{name} registers nothing; call strategies.register_loss, register_strategy or register_callback, or "
            "pipeline.register_dataset_type, when it is imported",
        )
    _LOADED[name] = _content(module)


def _content(module: ModuleType) -> bytes | None:
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else None


def _described(error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # its text has the line
        return what
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what} ({frame.filename}:{frame.lineno})"
