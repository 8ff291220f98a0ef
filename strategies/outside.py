"""External code: registration names, and errors with its file and line. Loads without torch."""

from __future__ import annotations

import functools
import inspect
import re
import traceback
from collections.abc import Container, Mapping
from typing import Any

__all__ = [
    "OutsideError",
    "RegistrationError",
    "claim",
    "described",
    "line_of",
    "name_of",
    "record_registration",
    "registrations",
]

_registrations = 0
_NAME = re.compile(r"[A-Za-z][\w.-]*")


class OutsideError(ValueError):
    """A plugin, or a function that it registered, failed; the message names it and the line."""


class RegistrationError(ValueError):
    """An object can't be registered; the message names it and the reason."""


def claim(what: str, name: str, value: Any, known: Mapping[str, Any], built_in: Container[str]) -> None:
    """Check that a name is free, and count the registration. A module that is imported again may register the same again.

    Raises:
        RegistrationError: if the name is taken or invalid.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RegistrationError(f"{what} {name!r}: a name is a letter, then letters, digits, '_', '-' or '.'")
    if not callable(value):
        raise RegistrationError(f"{what} {name!r}: give a function or a class, got {type(value).__name__}")
    if name in built_in:
        raise RegistrationError(f"{what} {name!r} is built in; give yours another name")
    # By name too: reloading a module makes another object of the same name.
    if name in known and known[name] is not value and name_of(known[name]) != name_of(value):
        raise RegistrationError(
            f"{what} {name!r} is registered twice, by {name_of(known[name])} and by {name_of(value)}; rename one of them"
        )
    record_registration()


def record_registration() -> None:
    """Increment the number of registrations in this process."""
    global _registrations
    _registrations += 1


def registrations() -> int:
    """Return the number of registrations in this process."""
    return _registrations


def name_of(value: Any) -> str:
    """Return module and qualified name of a function or class."""
    # The user's own function, inside of partials and of decorators that use `functools.wraps`.
    inner = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
    return f"{inner.__module__}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def described(what: str, function: Any, error: Exception) -> str:
    """Format an error of a registered function on one line, with its file and line."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    # The last line in the function's own file: a library's line, deeper, says little of the cause.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if code and frame.filename == code.co_filename]
    location = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else line_of(function)
    return f"{what} raised {type(error).__name__}: {error} ({location})"


def line_of(function: Any) -> str:
    """Return the file and line of a function's definition."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else name_of(function)
