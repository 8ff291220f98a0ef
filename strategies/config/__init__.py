"""Schema of the keys that this package reads; loads without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from strategies.simpo import SimPOKeys

__all__ = ["Keys", "LrGroup", "SpecialTokens", "StrategyConfig", "as_config", "key"]


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
):
    """Everything that decides what one worker trains."""


FOREIGN_KEYS = frozenset(
    "datasets test_datasets val_set_size dataset_prepared_path dataset_exact_deduplication excess_length_strategy "
    "max_rejected_fraction dataset_num_proc ray use_ray ray_num_workers resources_per_worker tune".split()
)
"""Keys of a recipe that other packages read; a recipe's mapping may hold them."""


def as_config(cfg: Any) -> Any:
    """Return a validated config: `cfg` itself, or, for a plain mapping, a `StrategyConfig` of it.

    Raises:
        ValueError: with one line per problem, `key: what is wrong`.
    """
    if not isinstance(cfg, Mapping):
        return cfg
    from strategies.config.rules import find_problems
    from strategies.registry import get_strategy

    config = StrategyConfig.model_validate({name: value for name, value in cfg.items() if name not in FOREIGN_KEYS})
    get_strategy(config.rl)
    problems = [f"{path}: {message}" for path, message in find_problems(config)]
    if problems:
        raise ValueError("\n".join(problems))
    return config
