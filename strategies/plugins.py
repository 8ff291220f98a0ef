"""Modules from outside that register losses, strategies, callbacks and dataset types. Loads without torch.

They are named by `plugins:` in a config, or by installed packages as entry points of the group `prefray.plugins`. They must be
loaded in every process that looks one of their names up: where a config is read, and where it is unpickled.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from strategies.errors import OutsideError
from strategies.keys import Keys, key
from strategies.registering import RegistrationError, registrations

__all__ = ["GROUP", "PluginError", "PluginKeys", "Plugins", "load_plugins"]

GROUP = "prefray.plugins"
"""Group of entry points; the value of each is a module."""

_LOADED: dict[str, frozenset[tuple[str, int, int]]] = {}
"""Module -> its files when it was imported, with their times of change and sizes."""
_FOLDERS: list[str] = []
"""Where modules of this run have been looked for, besides among the installed ones."""


class PluginKeys(Keys):
    """Code of the user's own."""

    plugins: list[str] | None = key(
        "Modules, also of the current directory, that register losses, strategies, dataset types or callbacks."
    )


class PluginError(OutsideError):
    """A plugin can't be loaded. `path` is the config key that names it, empty for an installed one."""

    def __init__(self, path: str, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(path, problem)  # from which it is made again in another process

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


@dataclass(frozen=True)
class Plugins:
    """The plugins of a run, as another process is told of them."""

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """Where they may lie, beside the places of installed packages."""

    @classmethod
    def of(cls, cfg: Any) -> Plugins:
        """Those of a config that was read in this process, or came to it."""
        return cls(tuple(getattr(cfg, "plugins", None) or ()), tuple(_FOLDERS))

    def load(self) -> None:
        """As `load_plugins`."""
        load_plugins(self.modules, self.folders)


def load_plugins(modules: Sequence[str] = (), folders: Sequence[str] = ()) -> None:
    """Import installed plugins and these modules. One whose file has changed since it was imported is imported anew.

    Args:
        modules: dotted names.
        folders: where modules may lie besides; the current directory when there are none. They are put at the end of
            `sys.path`, where installed packages come first, and stay there.

    Raises:
        PluginError: for a module that can't be imported, or registers nothing.
    """
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


@cache
def _installed(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points that can be found on a `sys.path`, by name."""
    return tuple(sorted(entry_points(group=GROUP), key=lambda point: point.name))


def _check_name(name: str, path: str) -> None:
    if name.partition(".")[0] == "axolotl":
        raise PluginError(path, f"{name!r} is a plugin of Axolotl's and means nothing here; remove it")
    if name.endswith(".py") or "/" in name:
        raise PluginError(path, f"expected the name of a module, got the file {name!r}; write {Path(name).stem}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise PluginError(path, f"expected the dotted name of a module, such as my_plugins, got {name!r}")


def _load(name: str, path: str, whose: str, remedy: str) -> None:
    """Import a module that registers something, unless it is here as its files say.

    Args:
        path: key that names it.
        whose: says where it comes from, where no key does.
        remedy: what to do when it isn't found.
    """
    if name in _LOADED and name in sys.modules and _LOADED[name] <= _files(name):  # others may have been imported since
        return
    if name in _LOADED:
        _drop(name)
    is_new, before = name not in sys.modules, registrations()
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise PluginError(path, f"{whose}can't import {name}: {error}{remedy}") from error
    except RegistrationError as error:
        raise PluginError(path, f"{whose}{name}: {error}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(path, f"{whose}{name} raised {_described(error)} when it was imported") from error
    if is_new and registrations() == before:
        _drop(name)
        raise PluginError(
            path,
            f"{whose}{name} registers nothing; call strategies.register_loss, register_strategy or register_callback, or "
            "pipeline.register_dataset_type, when it is imported",
        )
    _LOADED[name] = _files(name)


def _described(error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, SyntaxError):  # says where it is
        return what
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{what} ({frame.filename}:{frame.lineno})"


def _parts(name: str) -> list[str]:
    """The module and, of a package, what is in it, as far as they are imported."""
    return [other for other in sys.modules if other == name or other.startswith(f"{name}.")]


def _files(name: str) -> frozenset[tuple[str, int, int]]:
    files = [getattr(sys.modules[part], "__file__", None) for part in _parts(name)]
    found = [(file, Path(file).stat()) for file in files if file is not None and Path(file).is_file()]
    return frozenset((file, state.st_mtime_ns, state.st_size) for file, state in found)


def _drop(name: str) -> None:
    for part in _parts(name):
        del sys.modules[part]
