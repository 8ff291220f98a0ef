"""Loading and validation of a recipe as one strict `RunConfig`. Loads without torch and without ray."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import ScoreConfig
from cluster.config import find_problems as find_cluster_problems
from pipeline.config import selection_rules, sharding, tuning
from pipeline.config.axolotl import translated, without_sharding_of_one
from pipeline.config.loading import apply_overrides, check_keys, parse_yaml, read_yaml
from pipeline.config.messages import explain
from pipeline.config.recipe import RunConfig
from pipeline.data import keys as data_keys
from pipeline.data.keys import DatasetConfig
from pipeline.errors import ConfigError
from pipeline.secrets import find_redacted, redact
from strategies.config import with_strategy_keys
from strategies.config.rules import find_problems as find_strategy_problems
from strategies.methods.registry import STRATEGIES
from strategies.outside import RegistrationError
from strategies.plugins import PluginError, load_plugins

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


class PluginFailed(ConfigError):
    """A plugin can't be loaded; other problems of the recipe are still reported."""


PLACEHOLDERS = {"base_model": "-", "datasets": [{"path": "-"}]}
"""Values of required keys that are invalid or missing, while the other keys are checked."""


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `a.b=v` overrides, and validate.

    Args:
        recipe: a file, or the name of a packaged recipe.

    Raises:
        UserError: for a file that can't be read; ConfigError with all problems, each with its key's path.
    """
    path = Path(recipe)
    values = apply_overrides(read_yaml(path), overrides)
    # A saved config holds *** for its secrets, which would be used as passwords.
    if problems := list(find_redacted(values)):
        raise ConfigError(str(path), problems)
    return parse_config(values, origin=str(path))


def parse_config(values: Mapping[str, Any], origin: str = "config") -> RunConfig:
    """Load a mapping's plugins and validate its keys.

    Raises:
        ConfigError: with all problems; `origin` names the mapping.
    """
    cfg, problems = _read(values, origin)
    wrong = {path.split(".")[0] for path, _ in problems}
    # A check across keys may fail only for the placeholder of a key whose own problem is listed already.
    problems += [problem for problem in _find_problems(cfg) if not any(_mentions(problem, key) for key in wrong)]
    if problems:
        raise ConfigError(origin, problems)
    return cfg


def parse_saved(text: str, origin: str) -> RunConfig:
    """Parse the saved config of a run, without the checks across keys: files that it names may have been deleted.

    Raises:
        UserError: for invalid YAML; ConfigError, a subclass, for unknown keys or values.
    """
    cfg, problems = _read(parse_yaml(text, origin), origin)
    if problems:
        raise ConfigError(origin, problems)
    return cfg


def _read(values: Mapping[str, Any], origin: str) -> tuple[RunConfig, list[tuple[str, str]]]:
    """Validate a recipe; returns a config of its valid keys, and the problems of the others."""
    check_keys(values, origin)
    problems: list[tuple[str, str]] = []
    # Before validation, which would reject Axolotl's names.
    translated_values, changes = translated(values, RunConfig)
    changes += without_sharding_of_one(translated_values)
    try:
        model = config_class(translated_values.get("plugins"), origin)
    except PluginFailed as error:
        problems = error.problems
        translated_values = {key: value for key, value in translated_values.items() if key != "plugins"}
        try:
            model = with_strategy_keys(RunConfig)
        except RegistrationError:  # of another one than the plugin that failed; the next attempt reports it
            model = RunConfig
    try:
        cfg = model.model_validate(translated_values)
    except ValidationError as error:
        problems = sorted([*problems, *explain(error.errors(), model)])
        # The top key: a section with one invalid member is left out whole.
        wrong = {detail["loc"][0] for detail in error.errors()}
        right = {key: value for key, value in translated_values.items() if key not in wrong}
        cfg = model.model_validate({**PLACEHOLDERS, **right})  # for the checks across the other keys
    # A private attribute can be set on a frozen model, and isn't dumped with the recipe.
    cfg._notes = tuple(map(str, changes))
    return cfg, problems


def _mentions(problem: tuple[str, str], key: str) -> bool:
    """Return whether a problem mentions `key`: it may only result from that key's placeholder or default."""
    return re.search(rf"\b{re.escape(key)}\b", " ".join(problem)) is not None


def config_class(plugins: Any = None, origin: str = "config") -> type[RunConfig]:
    """Return `RunConfig` with the keys of strategies that plugins have registered.

    Args:
        plugins: modules to load, besides those of installed packages; validation rejects anything but a list of names.
        origin: names the config in messages.

    Raises:
        ConfigError: for a plugin that can't be loaded, or that defines an existing key.
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
    # Those checks need a valid section.
    if not any(path.startswith(("deepspeed", "fsdp_config")) for path, _ in wrong):
        yield from sharding.find_problems(cfg)
    yield from data_keys.find_problems(cfg)
    yield from selection_rules.find_problems(cfg)
    if cfg.tune is not None:
        yield from tuning.find_problems(cfg.tune)
    if cfg.rl in STRATEGIES and cfg.ray.score != ScoreConfig() and STRATEGIES[cfg.rl].reference_mode(cfg) != "cached":
        yield "ray.score", f"has no effect with rl: {cfg.rl}, which has no cached reference here; remove it"
    if cfg.wandb_watch not in (None, "false"):
        # wandb's `watch` hooks the model, which only the workers have.
        yield "wandb_watch", "gradients and weights stay with the workers, which don't report; remove it (grad_norm is logged)"
    if cfg.hf_mlflow_log_artifacts and "://" in cfg.output_dir:
        yield "hf_mlflow_log_artifacts", f"checkpoints are in storage already, at {cfg.output_dir!r}; remove it"
    if cfg.save_only_model and (cfg.ray.max_failures or cfg.is_elastic):
        yield "save_only_model", "leaves no optimizer for workers to restart with; remove it, or ray.max_failures"
    if cfg.is_elastic and cfg.rl in STRATEGIES and STRATEGIES[cfg.rl].batch_kind != "pair":
        why = "whose batches depend on the number of workers"
        yield "ray.num_workers", f"rl: {cfg.rl}, {why}, needs a fixed number; give one instead of min and max"


def dump_config(cfg: RunConfig) -> str:
    """Dump the resolved config as YAML that can be loaded again: with all defaults, without secrets."""
    return yaml.safe_dump(redact(cfg.model_dump(mode="json", exclude_none=True)), sort_keys=False, allow_unicode=True)
