"""JSON parsing that rejects duplicate keys of an object, of which other parsers silently keep the last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["TWICE", "strict_json"]

TWICE = "the key {!r} stands twice in an object"


def strict_json(text: str | bytes) -> Any:
    """Parse JSON text. Raises ValueError, or RecursionError for brackets nested a thousand deep."""
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    # json's default keeps the last value: of two answers in a row, one would be lost silently.
    for key, value in pairs:
        if key in result:
            raise ValueError(TWICE.format(key))
        result[key] = value
    return result
