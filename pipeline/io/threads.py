"""Requests to storage in several threads, which wait for its answers at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["ahead"]

A = TypeVar("A")
B = TypeVar("B")
THREADS = 16


def ahead(work: Callable[[A], B], items: Iterable[A], threads: int = THREADS) -> Iterator[B]:
    """Yield `work(item)` in order, up to `threads` results ahead of what has been taken. Raises what `work` raises."""
    remaining = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[B]] = deque(pool.submit(work, item) for item in islice(remaining, threads))
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(work, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in running:
                future.cancel()
