"""The whole config: every package's keys in one strict `RunConfig`. Loads without torch and without ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from cluster.config import ClusterKeys, ScoreConfig
from cluster.config import find_problems as find_cluster_problems
from pipeline.config import data as data_keys
from pipeline.config import sharding, tuning
from pipeline.config.axolotl import without_disabled
from pipeline.config.data import DataKeys, DatasetConfig
from pipeline.config.loading import apply_overrides, parse_yaml, read_yaml
from pipeline.config.messages import explain
from pipeline.config.secrets import find_redacted, redact
from pipeline.config.tuning import TuneConfig
from pipeline.errors import ConfigError
from strategies.config import StrategyConfig
from strategies.config.rules import find_problems as find_strategy_problems
from strategies.registry import STRATEGIES

__all__ = ["DatasetConfig", "RunConfig", "dump_config", "load_config", "parse_config", "parse_yaml"]


class RunConfig(DataKeys, StrategyConfig, ClusterKeys):
    """A validated recipe: Axolotl's keys, `ray:` and `tune:`."""

    tune: TuneConfig | None = Field(None, description="What `prefray tune` searches; `prefray train` leaves it aside.")


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `a.b=v` overrides, and validate.

    Raises:
        UserError: for a file that can't be read; ConfigError with every problem found, each with its key's path.
    """
    path = Path(recipe)
    values = apply_overrides(read_yaml(path), overrides)
    if problems := list(find_redacted(values)):
        raise ConfigError(str(path), problems)
    return parse_config(values, origin=str(path))


def parse_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Validate a mapping of keys.

    Raises:
        ConfigError: with every problem found; `origin` names the mapping.
    """
    try:
        cfg = RunConfig.model_validate(without_disabled(values, RunConfig))
    except ValidationError as error:
        raise ConfigError(origin, explain(error.errors(), RunConfig)) from None
    problems = list(_find_problems(cfg))
    if problems:
        raise ConfigError(origin, problems)
    return cfg


def _find_problems(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    yield from find_strategy_problems(cfg)
    wrong = list(find_cluster_problems(cfg))
    yield from wrong
    if not any(path.startswith(("deepspeed", "fsdp_config")) for path, _ in wrong):
        yield from sharding.find_problems(cfg)
    yield from data_keys.find_problems(cfg)
    if cfg.tune is not None:
        yield from tuning.find_problems(cfg.tune)
    if cfg.rl in STRATEGIES and cfg.ray.score != ScoreConfig() and STRATEGIES[cfg.rl].reference_mode(cfg) != "cached":
        yield "ray.score", f"has no effect with rl: {cfg.rl}, which has no cached reference here; remove it"
    if cfg.wandb_watch not in (None, "false"):
        yield "wandb_watch", "gradients and weights stay with the workers, which don't report; remove it (grad_norm is logged)"
    if cfg.hf_mlflow_log_artifacts and "://" in cfg.output_dir:
        yield "hf_mlflow_log_artifacts", f"checkpoints are in storage already, at {cfg.output_dir!r}; remove it"
    if cfg.save_only_model and (cfg.ray.max_failures or cfg.is_elastic):
        yield "save_only_model", "leaves no optimizer for workers to restart with; remove it, or ray.max_failures"
    if cfg.is_elastic and cfg.rl in STRATEGIES and STRATEGIES[cfg.rl].batch_kind != "pair":
        why = "whose batches depend on the number of workers"
        yield "ray.num_workers", f"rl: {cfg.rl}, {why}, needs a fixed number; give one instead of min and max"


def dump_config(cfg: RunConfig) -> str:
    """The resolved config as YAML: every default filled in, secrets left out, ready to be loaded again."""
    return yaml.safe_dump(redact(cfg.model_dump(mode="json", exclude_none=True)), sort_keys=False, allow_unicode=True)
