"""Paths in a config: resolves those relative to the current directory for the workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.sharding import STAGES
from pipeline.errors import UserError
from pipeline.io.storage import is_uri, locate, without_scheme
from strategies.models.location import model_values

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["IF_THERE", "absolute_models", "absolute_paths", "is_in_job_package", "lasting_outputs", "uris_of"]

Config = TypeVar("Config", bound="RunConfig")
OUTPUTS = ("output_dir", "dataset_prepared_path")
JOB_PACKAGES = "/runtime_resources/working_dir_files/"
"""Folder in which Ray unpacks the working directories of jobs, which it deletes after the jobs."""
LASTING = "~/prefray"
"""Base folder of relative output paths in jobs, as ~/ray_results is Ray's."""
IF_THERE = (
    "base_model",
    "base_model_config",
    "tokenizer_config",
    "reference_model",
    "lora_model_dir",
    "chat_template_jinja",
)
"""Keys whose values are local paths if such a file exists."""


def absolute_paths(cfg: Config) -> Config:
    """Return `cfg` with its local paths made absolute, since Ray's workers run in other folders.

    Hub ids, URIs but `file://`, and inline templates are unchanged: a value is a path if that path exists. Paths of datasets
    are unchanged too: they name the source of a row, so they are part of the fingerprint of the prepared data.

    Raises:
        UserError: as `locate`, with the key.
    """
    # Ray deletes the package that a job runs in, and relative outputs with it.
    outputs = lasting_outputs(cfg) if is_in_job_package() else {name: getattr(cfg, name) for name in OUTPUTS}
    located = {name: _located(name, location) for name, location in outputs.items()}
    return absolute_models(cfg).model_copy(update=located)


def absolute_models(cfg: Config) -> Config:
    """Return `cfg` with the local paths of what it reads beside the data made absolute, as `absolute_paths` does."""
    changed: dict[str, Any] = {}
    for name in IF_THERE:
        value = getattr(cfg, name)
        # A value that is no path here may be a hub id.
        if value is not None:
            changed[name] = _model(value)
    # Anything but a stage's name is the path of a file.
    if isinstance(cfg.deepspeed, str) and cfg.deepspeed not in STAGES:
        changed["deepspeed"] = _absolute(cfg.deepspeed)
    if cfg.trl is not None and cfg.trl.reward_funcs:
        rewards = [_model(reward) for reward in cfg.trl.reward_funcs]
        changed["trl"] = cfg.trl.model_copy(update={"reward_funcs": rewards})
    return cfg.model_copy(update=changed)


def _located(key: str, location: str) -> str:
    try:
        return str(locate(location))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def uris_of(cfg: RunConfig) -> Iterator[str]:
    """Yield the URIs of a recipe's outputs, models and data."""
    data = [dataset.path for name in ("datasets", "test_datasets") for dataset in getattr(cfg, name) or []]
    named = [*(getattr(cfg, key) for key in OUTPUTS), *(value for _, value in model_values(cfg)), *data]
    yield from filter(is_uri, named)


def is_in_job_package() -> bool:
    """Return whether the current directory is the package of a submitted job."""
    return JOB_PACKAGES in f"{Path.cwd()}/"


def lasting_outputs(cfg: RunConfig) -> dict[str, str]:
    """Return the output folders of a job: relative paths move to the nodes' home, since Ray deletes the job's package."""
    return {name: _in_home(getattr(cfg, name)) for name in OUTPUTS}


def _in_home(path: str) -> str:
    is_relative = not is_uri(path) and not Path(os.path.expanduser(path)).is_absolute()
    # Not expanded here: a client that submits a job calls this too, and `~` is the home on the nodes.
    return f"{LASTING}/{PurePosixPath(path)}" if is_relative else path


def _model(value: str) -> str:
    """Return the absolute path that a value is; URIs with their scheme in lower case, hub ids and others as they are."""
    path = without_scheme(value)
    is_path = not is_uri(path) and (path != value or _exists(path))
    return _absolute(path) if is_path else path


def _absolute(value: str) -> str:
    return str(Path(os.path.expanduser(value)).absolute())


def _exists(value: str) -> bool:
    try:
        return Path(os.path.expanduser(value)).exists()
    except OSError:  # an inline template is longer than a name may be
        return False
