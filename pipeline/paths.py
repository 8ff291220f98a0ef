"""Paths in a config: relative to where the command was given, absolute for everyone else."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.sharding import STAGES
from pipeline.errors import UserError
from pipeline.storage import is_uri, locate

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["IF_THERE", "absolute_paths", "is_in_job_package", "lasting_outputs"]

Config = TypeVar("Config", bound="RunConfig")
OUTPUTS = ("output_dir", "dataset_prepared_path")
JOB_PACKAGES = "/runtime_resources/working_dir_files/"
"""Where Ray unpacks the working directories of jobs, and deletes them after the jobs."""
LASTING = "~/prefray"
"""Where jobs write what a recipe gives a relative path, as Ray itself writes to ~/ray_results."""
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
    outputs = lasting_outputs(cfg) if is_in_job_package() else {name: getattr(cfg, name) for name in OUTPUTS}
    changed: dict[str, Any] = {name: str(locate(where)) for name, where in outputs.items()}
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


def is_in_job_package() -> bool:
    """Whether the current directory is what a job has brought to a cluster."""
    return JOB_PACKAGES in f"{Path.cwd()}/"


def lasting_outputs(cfg: RunConfig) -> dict[str, str]:
    """Where a job writes: a relative path would be in its package, which Ray deletes, so it is in the home of the nodes."""
    return {name: _lasting(getattr(cfg, name)) for name in OUTPUTS}


def _lasting(where: str) -> str:
    is_relative = not is_uri(where) and not Path(os.path.expanduser(where)).is_absolute()
    return f"{LASTING}/{PurePosixPath(where)}" if is_relative else where


def _absolute(value: str) -> str:
    return str(Path(os.path.expanduser(value)).absolute())


def _exists(value: str) -> bool:
    try:
        return Path(os.path.expanduser(value)).exists()
    except OSError:  # an inline template is longer than a name may be
        return False
