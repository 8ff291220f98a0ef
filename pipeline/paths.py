"""Paths in a config: relative to where the command was given, absolute for everyone else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["absolute_paths"]

Config = TypeVar("Config", bound="RunConfig")
FOLDERS = ("output_dir", "dataset_prepared_path")
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
    """
    changed = {name: str(Path(getattr(cfg, name)).expanduser().absolute()) for name in FOLDERS}
    for name in IF_THERE:
        value = getattr(cfg, name)
        if value is not None and _exists(value):
            changed[name] = str(Path(value).expanduser().absolute())
    return cfg.model_copy(update=changed)


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except OSError:  # an inline template is longer than a name may be
        return False
