"""The one place that knows the strategies by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.base import Strategy

__all__ = ["STRATEGIES", "get_strategy"]

STRATEGIES: dict[str, str] = {"dpo": "strategies.dpo:DPOStrategy"}
"""`rl:` value -> import path of the strategy; strategy modules import torch only when they build."""


def get_strategy(rl: str) -> type[Strategy]:
    """Return the strategy class of an `rl:` value.

    Raises:
        ValueError: for a name that is not registered.
    """
    if rl not in STRATEGIES:
        raise ValueError(f"rl: unknown strategy {rl!r}; available: {', '.join(STRATEGIES)}")
    module, name = STRATEGIES[rl].split(":")
    return getattr(importlib.import_module(module), name)
