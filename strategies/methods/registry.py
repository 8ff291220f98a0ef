"""Registry of strategies by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from strategies.keys import Keys
from strategies.methods.base import MethodKeys, PairKeys, Strategy
from strategies.methods.dpo import DPOKeys, DPOStrategy
from strategies.methods.grpo import GRPOKeys, GRPOStrategy
from strategies.methods.ipo import IPOStrategy
from strategies.methods.kto import KTOKeys, KTOStrategy
from strategies.methods.orpo import ORPOKeys, ORPOStrategy
from strategies.methods.simpo import SimPOKeys, SimPOStrategy
from strategies.outside import RegistrationError, claim, name_of

__all__ = [
    "BuiltInKeys",
    "STRATEGIES",
    "STRATEGY_KEYS",
    "get_strategy",
    "check_keys",
    "keys_of_strategies",
    "register_strategy",
]

_STRATEGIES = (
    DPOStrategy,
    IPOStrategy,
    SimPOStrategy,
    ORPOStrategy,
    KTOStrategy,
    GRPOStrategy,
)


class BuiltInKeys(
    MethodKeys,
    PairKeys,
    DPOKeys,
    SimPOKeys,
    ORPOKeys,
    KTOKeys,
    GRPOKeys,
):
    """The keys of all built-in strategies."""


STRATEGIES: dict[str, type[Strategy]] = {strategy.rl: strategy for strategy in _STRATEGIES}
"""`rl:` value -> strategy. A strategy's module imports torch only when it builds. `register_strategy` adds entries."""
STRATEGY_KEYS: dict[str, type[Keys]] = {}
"""`rl:` value -> the config keys that a registered strategy brings."""
_BUILT_IN = frozenset(STRATEGIES)


def get_strategy(rl: str) -> type[Strategy]:
    """Return the strategy class of an `rl:` value.

    Raises:
        ValueError: for a name that is not registered.
    """
    if rl not in STRATEGIES:
        raise ValueError(f"rl: unknown strategy {rl!r}; available: {', '.join(STRATEGIES)}")
    return STRATEGIES[rl]


def keys_of_strategies() -> frozenset[str]:
    """Return the method keys that any strategy reads."""
    return frozenset[str]().union(*(strategy.keys for strategy in STRATEGIES.values()))


def register_strategy(strategy: type[Strategy] | None = None, *, keys: type[Keys] | None = None) -> Any:
    """Register a subclass of `Strategy` under its attribute `rl`.

    Args:
        strategy: the class. If omitted, a decorator is returned.
        keys: a class of `Keys` with the config keys that the strategy adds to recipes. Each needs a default, since recipes
            of other strategies have them too.

    Raises:
        RegistrationError: for a name that is taken, an incomplete class, or invalid keys.
    """

    def register(strategy: type[Strategy]) -> type[Strategy]:
        _check_strategy(strategy, keys)
        claim("strategy", strategy.rl, strategy, STRATEGIES, _BUILT_IN)
        STRATEGIES[strategy.rl] = strategy
        # Those of an earlier definition, such as a notebook cell that was run before.
        STRATEGY_KEYS.pop(strategy.rl, None)
        if keys is not None:
            STRATEGY_KEYS[strategy.rl] = keys
        return strategy

    return register if strategy is None else register(strategy)


def _check_strategy(strategy: Any, keys: type[Keys] | None) -> None:
    if not inspect.isclass(strategy) or not issubclass(strategy, Strategy):
        raise RegistrationError(f"strategy {strategy!r}: must be a class of strategies.methods.base.Strategy")
    name = strategy.__qualname__
    # `Strategy` only annotates them, so `hasattr` finds only what subclasses set.
    wanted = ("rl", "keys", "requires_reference", "batch_kind", "best_metric")
    missing = [attribute for attribute in wanted if not hasattr(strategy, attribute)] + sorted(strategy.__abstractmethods__)
    if missing:
        raise RegistrationError(f"strategy {name}: lacks {', '.join(missing)}")
    added = {} if keys is None else keys.model_fields
    if required := [key for key, field in added.items() if field.is_required()]:
        raise RegistrationError(
            f"strategy {name}: its key {required[0]!r} needs a default, which may be None, for other recipes don't set it"
        )
    if unread := sorted(added.keys() - strategy.keys):
        raise RegistrationError(f"strategy {name}: doesn't read its own key {unread[0]!r}; add it to the attribute `keys`")


def check_keys(known: Collection[str]) -> None:
    """Check that registered strategies read keys that exist.

    Args:
        known: keys of a recipe that are not added by registered strategies.

    Raises:
        RegistrationError: naming the strategy and the key.
    """
    for rl, strategy in list(STRATEGIES.items()):
        if rl in _BUILT_IN:
            continue
        added = STRATEGY_KEYS[rl].model_fields if rl in STRATEGY_KEYS else {}
        # Of `section.key` only the section is looked up.
        if unknown := sorted(key for key in strategy.keys if key.partition(".")[0] not in {*known, *added}):
            del STRATEGIES[rl]  # so that recipes without it can be read
            STRATEGY_KEYS.pop(rl, None)
            raise RegistrationError(
                f"strategy {name_of(strategy)}: reads {unknown[0]!r}, which is no key; declare it: register_strategy(keys=...)"
            )
