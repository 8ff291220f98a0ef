"""The one place that knows the strategies by name."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.dpo import DPOStrategy
from strategies.grpo import GRPOStrategy
from strategies.ipo import IPOStrategy
from strategies.keys import Keys
from strategies.kto import KTOStrategy
from strategies.orpo import ORPOStrategy
from strategies.simpo import SimPOStrategy

__all__ = ["STRATEGIES", "STRATEGY_KEYS", "get_strategy", "keys_of_strategies"]

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.rl: strategy for strategy in (DPOStrategy, IPOStrategy, SimPOStrategy, ORPOStrategy, KTOStrategy, GRPOStrategy)
}
"""`rl:` value -> strategy. A strategy's module imports torch only when it builds. `register_strategy` adds others."""
STRATEGY_KEYS: dict[str, type[Keys]] = {}
"""`rl:` value -> the config keys that a registered strategy brings."""


def get_strategy(rl: str) -> type[Strategy]:
    """Return the strategy class of an `rl:` value.

    Raises:
        ValueError: for a name that is not registered.
    """
    if rl not in STRATEGIES:
        raise ValueError(f"rl: unknown strategy {rl!r}; available: {', '.join(STRATEGIES)}")
    return STRATEGIES[rl]


def keys_of_strategies() -> frozenset[str]:
    """Method keys that any strategy reads."""
    return frozenset[str]().union(*(strategy.keys for strategy in STRATEGIES.values()))
