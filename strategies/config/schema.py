"""`StrategyConfig`, and the keys that registered strategies add to it."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, create_model

from strategies.config.adapter import AdapterKeys
from strategies.config.model import ModelKeys
from strategies.config.optimizer import OptimizerKeys
from strategies.config.trainer import AcceleratorKeys, HubKeys, PluginKeys, TrackerKeys, TrainerKeys
from strategies.keys import Keys
from strategies.methods.registry import STRATEGY_KEYS, BuiltInKeys, check_keys
from strategies.outside import RegistrationError
from strategies.plugins import Plugins

__all__ = ["StrategyConfig", "StrategyFields", "with_strategy_keys"]


class StrategyFields(
    ModelKeys,
    AdapterKeys,
    BuiltInKeys,
    OptimizerKeys,
    TrainerKeys,
    TrackerKeys,
    HubKeys,
    AcceleratorKeys,
    PluginKeys,
):
    """The keys of all built-in strategies, and their common keys."""


Model = TypeVar("Model", bound="StrategyConfig")


class StrategyConfig(StrategyFields):
    """Config of one worker's training.

    Registered strategies add keys, in a subclass that `with_strategy_keys` creates. A config is pickled with the names of its
    plugins, which are loaded before the class is created again.
    """

    extends: ClassVar[type[StrategyConfig] | None] = None
    """Base class of a class that `with_strategy_keys` created."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the base class, the plugins and the state."""
        # A class of `create_model` is no attribute of its module, where pickle would look for it.
        cls = type(self)
        return _unpickled, (cls.extends or cls, Plugins.of(self)), self.__getstate__()


def _unpickled(base: type[Model], plugins: Plugins) -> Model:
    # Only then are their strategies' keys known in this process.
    plugins.load()
    model = with_strategy_keys(base)
    return model.__new__(model)


def with_strategy_keys(base: type[Model]) -> type[Model]:
    """Return a subclass of `base` with the keys of registered strategies; `base` itself if they add none.

    Raises:
        RegistrationError: for a key that already exists, or a strategy that reads one that doesn't.
    """
    check_keys(base.model_fields)
    return _extended(base, tuple(STRATEGY_KEYS.items())) if STRATEGY_KEYS else base


# Cached, so that all configs with the same keys are of one class; the tuple makes the registry's state the cache's key.
@cache
def _extended(base: type[Model], added: tuple[tuple[str, type[Keys]], ...]) -> type[Model]:
    known = dict.fromkeys(base.model_fields, "prefray")
    # Two strategies may share a class of keys, which may be a base only once.
    kinds = list(dict.fromkeys(keys for _, keys in added))
    for keys in kinds:
        rl = next(rl for rl, brought in added if brought is keys)
        for name in keys.model_fields:
            if name in known and not _is_inherited(name, keys, base):
                raise RegistrationError(f"strategy {rl!r}: its key {name!r} is a key of {known[name]} already; rename it")
            known[name] = f"strategy {rl!r}"
    make: Any = create_model  # typed too narrowly for a class as base
    model: type[Model] = make(base.__name__, __base__=(base, *kinds), __module__=base.__module__, __doc__=base.__doc__)
    model.extends = base
    return model


def _is_inherited(name: str, keys: type[BaseModel], base: type[BaseModel]) -> bool:
    """Return whether both classes inherit a key from a common base."""
    return any(name in vars(cls).get("__annotations__", {}) and cls in base.__mro__ for cls in keys.__mro__)
