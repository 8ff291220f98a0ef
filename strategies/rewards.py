"""Reward functions by dotted path, and reward models by folder or hub id."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Reward", "load_reward_functions"]

Reward = Callable[..., Any] | str
"""A function, or the folder or hub id of a reward model, which TRL loads with its tokenizer."""

# What TRL passes by keyword, beside the columns of the rows.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load_reward_functions(paths: Iterable[str], key: str = "trl.reward_funcs") -> list[Reward]:
    """Return the reward of each path: `module.function`, or a reward model's folder or hub id, which stays text.

    A function is called as `function(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=,
    **columns)`, each column a list with one entry per completion, and returns a list of floats; None leaves a completion
    out. It may be a coroutine function.

    The current directory counts as a place of modules: it is put at the end of `sys.path`, where installed packages come
    first, and stays there, since a function may import its neighbours when it is called.

    Args:
        key: of the paths, in messages.

    Raises:
        ValueError: `trl.reward_funcs.0: ...`, for a path that leads to no function that can be called like this.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()  # a module may have been written a moment ago
    return [_load(path, f"{key}.{index}") for index, path in enumerate(paths)]


def _load(path: str, key: str) -> Reward:
    if "/" in path or Path(path).is_dir():
        return _reward_model(path, key)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{key}: expected module.function or a folder of a reward model, got {path!r}")
    module = _import(module_name, key)
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{key}: {_place(module)} has no function {name!r}; {_nearest(module, name)}")
    if not callable(function):
        raise ValueError(f"{key}: {path} is no function but {type(function).__name__}")
    _check_signature(function, path, key)
    return _guarded(function, f"{key}: {path}")


def _reward_model(path: str, key: str) -> str:
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key}: the folder {path} holds no model (no config.json)")
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{key}: no such folder: {path}")
    return path


def _import(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{key}: can't import {name}: {what}; the module must be importable on every worker (the current directory, "
            f"{Path.cwd()}, counts)"
        ) from error


def _place(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None) or 'a folder without code'})"


def _nearest(module: ModuleType, name: str) -> str:
    functions = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
    nearest = difflib.get_close_matches(name, functions, n=3) or sorted(functions)[:10]
    return f"did you mean {', '.join(nearest)}?" if nearest else "it has no functions at all"


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function; what it raises, or returns in place of a number per completion, is said under its name."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call(*, completions: list[Any], **columns: Any) -> list[float | None]:
            try:
                found = await function(completions=completions, **columns)
            except Exception as error:
                raise _raised(name, error) from error
            return _numbers(found, len(completions), name)

        return call

    @functools.wraps(function)
    def call_now(*, completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            found = function(completions=completions, **columns)
        except Exception as error:
            raise _raised(name, error) from error
        return _numbers(found, len(completions), name)

    return call_now


def _raised(name: str, error: Exception) -> ValueError:
    """Whatever the user's function raises is the user's to mend, so it must say whose it is."""
    return ValueError(f"{name} raised {type(error).__name__}: {error}")


def _numbers(found: Any, number: int, name: str) -> list[float | None]:
    try:
        rewards = list(found)
    except TypeError:
        raise ValueError(f"{name} must return a list of {number} numbers, got {type(found).__name__}") from None
    if len(rewards) != number:
        raise ValueError(f"{name} must return one number per completion, got {len(rewards)} for {number}")
    for reward in rewards:
        try:
            infinite = reward is not None and math.isinf(float(reward))
        except (TypeError, ValueError):
            raise ValueError(f"{name} must return numbers (None where it doesn't judge), got {reward!r}") from None
        if infinite:
            raise ValueError(f"{name} must return finite numbers, got {reward!r}")
    return rewards


def _check_signature(function: Callable[..., Any], path: str, key: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters) or by_name >= set(PASSED)
    needs_order = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if not takes_all or needs_order:
        raise ValueError(
            f"{key}: {path}{inspect.signature(function)} can't be called with {', '.join(PASSED)} and the rows' columns by "
            "keyword; take those that you need by name and the others as **kwargs, as in `def f(completions, **kwargs)`"
        )
