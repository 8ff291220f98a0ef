"""Schema of the keys that this package reads; loads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, create_model

from strategies.base import MethodKeys, PairKeys
from strategies.config.adapter import AdapterKeys
from strategies.config.model import ModelKeys, SpecialTokens
from strategies.config.optimizer import LrGroup, OptimizerKeys
from strategies.config.trainer import AcceleratorKeys, HubKeys, TrackerKeys, TrainerKeys
from strategies.dpo import DPOKeys
from strategies.grpo import GRPOKeys
from strategies.keys import Keys, key
from strategies.kto import KTOKeys
from strategies.orpo import ORPOKeys
from strategies.plugins import PluginKeys, Plugins, load_plugins
from strategies.registering import RegistrationError
from strategies.registry import STRATEGY_KEYS
from strategies.simpo import SimPOKeys

__all__ = ["Keys", "LrGroup", "SpecialTokens", "StrategyConfig", "as_config", "key", "with_strategy_keys"]

Model = TypeVar("Model", bound="StrategyConfig")


class StrategyConfig(
    ModelKeys,
    AdapterKeys,
    MethodKeys,
    PairKeys,
    DPOKeys,
    SimPOKeys,
    ORPOKeys,
    KTOKeys,
    GRPOKeys,
    OptimizerKeys,
    TrainerKeys,
    TrackerKeys,
    HubKeys,
    AcceleratorKeys,
    PluginKeys,
):
    """Everything that decides what one worker trains.

    Strategies from outside bring keys of their own, in a class that `with_strategy_keys` makes. A config therefore travels to
    other processes with the names of its plugins, which are loaded there before the class is looked up.
    """

    extends: ClassVar[type[StrategyConfig] | None] = None
    """Of a class that `with_strategy_keys` has made, the one that it was made of."""

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled."""
        cls = type(self)
        return _unpickled, (cls.extends or cls, Plugins.of(self)), self.__getstate__()


def _unpickled(base: type[Model], plugins: Plugins) -> Model:
    plugins.load()
    model = with_strategy_keys(base)
    return model.__new__(model)


def with_strategy_keys(base: type[Model]) -> type[Model]:
    """`base` with the keys that registered strategies bring; `base` itself when they bring none.

    Raises:
        RegistrationError: for a key that there is already.
    """
    return _extended(base, tuple(STRATEGY_KEYS.items())) if STRATEGY_KEYS else base


@cache
def _extended(base: type[Model], added: tuple[tuple[str, type[Keys]], ...]) -> type[Model]:
    known = dict.fromkeys(base.model_fields, "prefray")
    kinds = list(dict.fromkeys(keys for _, keys in added))
    for keys in kinds:
        rl = next(rl for rl, brought in added if brought is keys)
        for name in keys.model_fields:
            if name in known and not _is_inherited(name, keys, base):
                raise RegistrationError(f"strategy {rl!r}: its key {name!r} is a key of {known[name]} already; rename it")
            known[name] = f"strategy {rl!r}"
    make: Any = create_model  # what it returns, no checker knows
    model: type[Model] = make(base.__name__, __base__=(base, *kinds), __module__=base.__module__, __doc__=base.__doc__)
    model.extends = base
    return model


def _is_inherited(name: str, keys: type[BaseModel], base: type[BaseModel]) -> bool:
    """Whether a key comes from one class that both build on."""
    return any(name in vars(one).get("__annotations__", {}) and one in base.__mro__ for one in keys.__mro__)


FOREIGN_KEYS = frozenset(
    "datasets test_datasets val_set_size dataset_prepared_path dataset_exact_deduplication excess_length_strategy "
    "max_rejected_fraction encode_special_tokens dataset_num_proc ray use_ray ray_num_workers resources_per_worker tune".split()
)
"""Keys of a recipe that other packages read; a recipe's mapping may hold them."""


def as_config(cfg: Any) -> Any:
    """Return a validated config: `cfg` itself, or, for a plain mapping, a `StrategyConfig` of it.

    Raises:
        ValueError: with one line per problem, `key: what is wrong`; as `load_plugins`.
    """
    if not isinstance(cfg, Mapping):
        return cfg
    from strategies.config.rules import find_problems
    from strategies.registry import get_strategy

    load_plugins(cfg.get("plugins") or ())
    config = with_strategy_keys(StrategyConfig).model_validate(
        {name: value for name, value in cfg.items() if name not in FOREIGN_KEYS}
    )
    get_strategy(config.rl)
    problems = [f"{path}: {message}" for path, message in find_problems(config)]
    if problems:
        raise ValueError("\n".join(problems))
    return config
