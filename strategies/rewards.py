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

from strategies.models.location import is_remote, resolve_model_location

__all__ = ["Reward", "load_reward_functions"]

Reward = Callable[..., Any] | str
"""A function, or the folder or hub id of a reward model, which TRL loads with its tokenizer."""

# TRL's keyword arguments of a reward function, besides the columns of the rows.
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load_reward_functions(paths: Iterable[str], key: str = "trl.reward_funcs") -> list[Reward]:
    """Load the reward of each path: `module.function`, or a reward model's folder or hub id, which stays a string.

    A function is called as `function(prompts=, completions=, completion_ids=, trainer_state=, log_extra=, log_metric=,
    **columns)`, each column a list with one entry per completion, and returns a list of floats; None excludes a
    completion. It may be a coroutine function.

    The current directory is appended to `sys.path`, after installed packages, and stays there, since a function may import
    neighbouring modules when it is called.

    Args:
        key: config key of the paths, for messages.

    Raises:
        ValueError: `trl.reward_funcs.0: ...`, for a path that doesn't resolve to a function with this signature.
    """
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.append(cwd)
    importlib.invalidate_caches()  # a module may have just been written
    return [_load(path, f"{key}.{index}") for index, path in enumerate(paths)]


def _load(path: str, key: str) -> Reward:
    if "/" in path or Path(path).is_dir():
        # A dotted path has no slash; a folder beside the recipe may have none either.
        return _reward_model(path, key)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{key}: expected module.function or a folder of a reward model, got {path!r}")
    module = _import(module_name, key)
    function = getattr(module, name, None)
    if function is None:
        raise ValueError(f"{key}: {_describe_module(module)} has no function {name!r}; {_nearest(module, name)}")
    if not callable(function):
        raise ValueError(f"{key}: {path} is no function but {type(function).__name__}")
    _check_signature(function, path, key)
    return _checked(function, f"{key}: {path}")


def _reward_model(path: str, key: str) -> str:
    if is_remote(path):
        path = resolve_model_location(path, key).path
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


def _describe_module(module: ModuleType) -> str:
    return f"{module.__name__} ({getattr(module, '__file__', None) or 'a folder without code'})"


def _nearest(module: ModuleType, name: str) -> str:
    functions = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
    nearest = difflib.get_close_matches(name, functions, n=3) or sorted(functions)[:10]
    return f"did you mean {', '.join(nearest)}?" if nearest else "it has no functions at all"


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Wrap the function, so that errors and wrong return values are reported under its name."""
    # A wrapper of either kind: TRL awaits what is a coroutine function, and names metrics by `__name__`.
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        @functools.wraps(function)
        async def call(*, completions: list[Any], **columns: Any) -> list[float | None]:
            try:
                rewards = await function(completions=completions, **columns)
            except Exception as error:
                raise _raised(name, error) from error
            return _numbers(rewards, len(completions), name)

        return call

    @functools.wraps(function)
    def call_now(*, completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            rewards = function(completions=completions, **columns)
        except Exception as error:
            raise _raised(name, error) from error
        return _numbers(rewards, len(completions), name)

    return call_now


def _raised(name: str, error: Exception) -> ValueError:
    """Return an error that names the user's function."""
    return ValueError(f"{name} raised {type(error).__name__}: {error}")


def _numbers(values: Any, count: int, name: str) -> list[float | None]:
    try:
        rewards = list(values)
    except TypeError:
        raise ValueError(f"{name} must return a list of {count} numbers, got {type(values).__name__}") from None
    if len(rewards) != count:
        raise ValueError(f"{name} must return one number per completion, got {len(rewards)} for {count}")
    for reward in rewards:
        try:
            # NaN passes: TRL makes it of None. An infinite one spoils the mean of its group.
            infinite = reward is not None and math.isinf(float(reward))
        except (TypeError, ValueError):
            raise ValueError(f"{name} must return numbers (None where it doesn't judge), got {reward!r}") from None
        if infinite:
            raise ValueError(f"{name} must return finite numbers, got {reward!r}")
    return rewards


def _check_signature(function: Callable[..., Any], path: str, key: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # TRL passes everything by keyword, wanted or not.
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters) or by_name >= set(PASSED)
    needs_order = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if not takes_all or needs_order:
        raise ValueError(
            f"{key}: {path}{inspect.signature(function)} can't be called with {', '.join(PASSED)} and the rows' columns by "
            "keyword; take those that you need by name and the others as **kwargs, as in `def f(completions, **kwargs)`"
        )
