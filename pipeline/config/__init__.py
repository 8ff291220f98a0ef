"""The whole config: every package's keys in one strict `RunConfig`. Loads without torch and without ray."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from cluster.config import ClusterKeys, ScoreConfig
from cluster.config import find_problems as find_cluster_problems
from pipeline.config import data as data_keys
from pipeline.config import sharding, tuning
from pipeline.config.axolotl import translated, without_sharding_of_one
from pipeline.config.data import DataKeys, DatasetConfig
from pipeline.config.loading import apply_overrides, check_keys, parse_yaml, read_yaml
from pipeline.config.messages import explain
from pipeline.config.secrets import find_redacted, redact
from pipeline.config.tuning import TuneConfig
from pipeline.errors import ConfigError
from strategies.config import StrategyConfig, with_strategy_keys
from strategies.config.rules import find_problems as find_strategy_problems
from strategies.plugins import PluginError, load_plugins
from strategies.registering import RegistrationError
from strategies.registry import STRATEGIES

__all__ = [
    "DatasetConfig",
    "RunConfig",
    "config_class",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_saved",
    "parse_yaml",
]


class RunConfig(DataKeys, StrategyConfig, ClusterKeys):
    """A validated recipe: Axolotl's keys, `ray:` and `tune:`."""

    tune: TuneConfig | None = Field(None, description="What `prefray tune` searches; `prefray train` leaves it aside.")
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """Keys that were read as others, or left out, each as a sentence."""
        return self._notes


class PluginFailed(ConfigError):
    """A plugin can't be loaded; what else is wrong with a recipe can be said all the same."""


PLACEHOLDERS = {"base_model": "-", "datasets": [{"path": "-"}]}
"""What stands for keys that every recipe has, where they are wrong or missing, while the others are checked."""


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `a.b=v` overrides, and validate.

    Args:
        recipe: a file, or the name of a packaged recipe.

    Raises:
        UserError: for a file that can't be read; ConfigError with every problem found, each with its key's path.
    """
    path = Path(recipe)
    values = apply_overrides(read_yaml(path), overrides)
    if problems := list(find_redacted(values)):
        raise ConfigError(str(path), problems)
    return parse_config(values, origin=str(path))


def parse_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Validate a mapping of keys, after its plugins are loaded.

    Raises:
        ConfigError: with every problem found; `origin` names the mapping.
    """
    cfg, problems = _read(values, origin)
    wrong = {path.split(".")[0] for path, _ in problems}
    problems += [found for found in _find_problems(cfg) if not any(_speaks_of(found, key) for key in wrong)]
    if problems:
        raise ConfigError(origin, problems)
    return cfg


def parse_saved(text: str, origin: str) -> RunConfig:
    """A config as a run has saved it: what was right then isn't judged again, for files that it names may be gone.

    Raises:
        UserError: when it is no YAML; ConfigError, a kind of it, for keys or values that aren't known.
    """
    cfg, problems = _read(parse_yaml(text, origin), origin)
    if problems:
        raise ConfigError(origin, problems)
    return cfg


def _read(values: Mapping[str, Any], origin: str) -> tuple[RunConfig, list[tuple[str, str]]]:
    """What of a recipe validates, and the problems of the rest."""
    check_keys(values, origin)
    problems: list[tuple[str, str]] = []
    given, changes = translated(values, RunConfig)
    changes += without_sharding_of_one(given)
    try:
        model = config_class(given.get("plugins"), origin)
    except PluginFailed as error:
        problems = error.problems
        given = {key: value for key, value in given.items() if key != "plugins"}
        model = with_strategy_keys(RunConfig)
    try:
        cfg = model.model_validate(given)
    except ValidationError as error:
        problems = sorted([*problems, *explain(error.errors(), model)])
        wrong = {place["loc"][0] for place in error.errors()}
        right = {key: value for key, value in given.items() if key not in wrong}
        cfg = model.model_validate({**PLACEHOLDERS, **right})  # what is left can be right or wrong together all the same
    cfg._notes = tuple(map(str, changes))
    return cfg, problems


def _speaks_of(problem: tuple[str, str], key: str) -> bool:
    """Whether a problem may only be there because another key wasn't taken."""
    return re.search(rf"\b{re.escape(key)}\b", " ".join(problem)) is not None


def config_class(plugins: Any = None, origin: str = "config") -> type[RunConfig]:
    """`RunConfig`, with the keys of strategies that plugins have registered.

    Args:
        plugins: modules to load, beside those of installed packages; what is no list of names is left to be refused.
        origin: names the config in messages.

    Raises:
        ConfigError: for a plugin that can't be loaded, or that brings a key which there is already.
    """
    is_list = isinstance(plugins, list) and all(isinstance(name, str) for name in plugins)
    try:
        load_plugins(plugins if is_list else ())
        return with_strategy_keys(RunConfig)
    except PluginError as error:
        raise PluginFailed(origin, [(error.path, error.problem)]) from error
    except RegistrationError as error:
        raise ConfigError(origin, [("plugins", str(error))]) from error


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
