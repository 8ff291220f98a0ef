"""Paths in a config: relative to where the command was given, absolute for everyone else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.sharding import STAGES
from pipeline.errors import UserError
from pipeline.storage import is_uri, locate

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["absolute_paths"]

Config = TypeVar("Config", bound="RunConfig")
IF_THERE = (
    "base_model",
    "base_model_config",
    "tokenizer_config",
    "reference_model",
    "lora_model_dir",
    "chat_template_jinja",
)


def absolute_paths(cfg: Config) -> Config:
    """Return `cfg` with its local paths made absolute: Ray's workers run in folders of their own.

    Hub ids, URIs and inline templates stay as they are: a value is a path when something is there. Paths of data sets
    stay too, for they name a row's source and so belong to the fingerprint of the prepared data.

    Raises:
        UserError: for prepared data at a URI.
    """
    changed: dict[str, Any] = {name: str(locate(getattr(cfg, name))) for name in ("output_dir", "dataset_prepared_path")}
    if is_uri(prepared := changed["dataset_prepared_path"]):
        raise UserError(
            f"dataset_prepared_path: must be a folder that all nodes share, got the URI {prepared!r}; "
            "only output_dir may be one"
        )
    for name in IF_THERE:
        value = getattr(cfg, name)
        if value is not None and _exists(value):
            changed[name] = _absolute(value)
    if isinstance(cfg.deepspeed, str) and cfg.deepspeed not in STAGES:
        changed["deepspeed"] = _absolute(cfg.deepspeed)
    if cfg.trl is not None and cfg.trl.reward_funcs:
        rewards = [_absolute(reward) if _exists(reward) else reward for reward in cfg.trl.reward_funcs]
        changed["trl"] = cfg.trl.model_copy(update={"reward_funcs": rewards})
    return cfg.model_copy(update=changed)


def _absolute(value: str) -> str:
    return str(Path(value).expanduser().absolute())


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except OSError:  # an inline template is longer than a name may be
        return False
