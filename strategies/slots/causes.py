"""What an error was raised from."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["causes"]


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then what it was raised from or during, each once: `raise error from error` makes a circle."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        following = found.__cause__ or found.__context__
        yield found
        found = following
