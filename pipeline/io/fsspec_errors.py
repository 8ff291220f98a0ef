"""Errors of fsspec's filesystems, whose clients have classes of their own: they become OSErrors, as other filesystems raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["WithOSErrors"]


class WithOSErrors:
    """A filesystem of fsspec, or a file that it has opened, that raises no errors but OSError and NotImplementedError."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._wrapped, name)
        return _with_oserrors(value) if callable(value) else value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithOSErrors) and self._wrapped == other._wrapped

    def __hash__(self) -> int:
        return hash(self._wrapped)

    def __reduce__(self) -> tuple[Any, ...]:
        return WithOSErrors, (self._wrapped,)

    def open(self, *arguments: Any, **options: Any) -> WithOSErrors:
        return WithOSErrors(_with_oserrors(self._wrapped.open)(*arguments, **options))


def _with_oserrors(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return operation(*arguments, **options)
        except (OSError, NotImplementedError):  # the second for what a store can't do at all
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return run
