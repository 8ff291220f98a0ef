"""Experiment trackers of a config, and the arguments of transformers' callbacks that report to them without Ray."""

from __future__ import annotations

from typing import Any

from strategies.config.trainer import CALLBACK_ARGUMENTS, CALLBACK_VARIABLES, TRACKER_SWITCHES, TrackerKeys

__all__ = ["TRACKER_NAMES", "tracker_arguments", "tracker_environment", "used_trackers", "without_trackers"]

TRACKER_NAMES = tuple(name.removeprefix("use_") for name in TrackerKeys.model_fields if name.startswith("use_"))


def used_trackers(cfg: Any) -> list[str]:
    """Return the trackers that a config enables: by `use_NAME: true`, or by naming a project or an experiment."""
    return [name for name in TRACKER_NAMES if _is_used(cfg, name)]


def _is_used(cfg: Any, name: str) -> bool:
    switch = getattr(cfg, f"use_{name}")
    return bool(getattr(cfg, TRACKER_SWITCHES[name]) if switch is None and name in TRACKER_SWITCHES else switch)


def without_trackers(cfg: Any) -> Any:
    """Return the config without trackers."""
    return cfg.model_copy(update=dict.fromkeys(TrackerKeys.model_fields))


def tracker_arguments(cfg: Any) -> dict[str, Any]:
    """Return the arguments that name the trackers (`report_to`, none by default), the run and the project."""
    arguments: dict[str, Any] = {"report_to": used_trackers(cfg)}
    for name, argument in CALLBACK_ARGUMENTS.items():
        if value := getattr(cfg, name):
            # Trackers share the argument; the order of `CALLBACK_ARGUMENTS` decides between them.
            arguments.setdefault(argument, value)
    return arguments


def tracker_environment(cfg: Any) -> dict[str, str]:
    """Return the environment variables of the trackers' keys; `HFRLTrainerBuilder.build` sets them."""
    variables = {name.upper(): str(getattr(cfg, name)) for name in CALLBACK_VARIABLES if getattr(cfg, name) is not None}
    if "WANDB_RUN_ID" in variables:
        # The run of that id is continued if it exists; otherwise it is created.
        variables["WANDB_RESUME"] = "allow"
    if cfg.use_tensorboard:
        # One folder for a run and its continuations; transformers would name one by time and host.
        variables["TENSORBOARD_LOGGING_DIR"] = f"{cfg.output_dir}/tensorboard"
    return variables
