"""Validation of a mapping as a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from strategies.config.rules import find_problems
from strategies.config.schema import StrategyConfig, with_strategy_keys
from strategies.methods.registry import get_strategy
from strategies.plugins import load_plugins

__all__ = ["as_config"]

FOREIGN_KEYS = frozenset(
    "datasets test_datasets val_set_size dataset_prepared_path dataset_exact_deduplication excess_length_strategy "
    "max_rejected_fraction encode_special_tokens template_date dataset_num_proc ray use_ray ray_num_workers "
    "resources_per_worker select split_by split_seed tune".split()
)
"""Keys of a recipe that other packages read; a recipe's mapping may hold them."""


def as_config(cfg: Any) -> Any:
    """Return a validated config: `cfg` itself, or, for a plain mapping, a `StrategyConfig` of it.

    Raises:
        ValueError: with one line per problem, `key: message`; also those of `load_plugins`.
    """
    if not isinstance(cfg, Mapping):
        return cfg
    # First, since strategies of plugins add keys to the schema.
    load_plugins(cfg.get("plugins") or ())
    config = with_strategy_keys(StrategyConfig).model_validate(
        {name: value for name, value in cfg.items() if name not in FOREIGN_KEYS}
    )
    # For its error; `find_problems` passes over an unknown strategy, of which it knows no keys.
    get_strategy(config.rl)
    problems = [f"{path}: {message}" for path, message in find_problems(config)]
    if problems:
        raise ValueError("\n".join(problems))
    return config
