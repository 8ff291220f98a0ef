"""Experiment trackers: which ones a config asks for, and how transformers' callbacks report to them where there is no Ray."""

from __future__ import annotations

from typing import Any

__all__ = ["TRACKERS", "tracker_arguments", "tracker_environment", "used_trackers", "without_trackers"]

TRACKERS = {
    "tensorboard": None,
    "wandb": "wandb_project",
    "mlflow": "mlflow_experiment_name",
    "trackio": "trackio_project_name",
}
"""Name -> the key that asks for it too, as in Axolotl, where `use_NAME` isn't set."""

# transformers' callbacks read these from the environment and from nowhere else.
ENVIRONMENT = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_run_id": "WANDB_RUN_ID",
    "wandb_mode": "WANDB_MODE",
    "wandb_watch": "WANDB_WATCH",
    "wandb_log_model": "WANDB_LOG_MODEL",
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "mlflow_experiment_name": "MLFLOW_EXPERIMENT_NAME",
    "hf_mlflow_log_artifacts": "HF_MLFLOW_LOG_ARTIFACTS",
}


def used_trackers(cfg: Any) -> list[str]:
    """Names of the trackers that a config asks for: by `use_NAME: true`, or by naming a project or an experiment."""
    return [name for name, key in TRACKERS.items() if _asks(cfg, name, key)]


def _asks(cfg: Any, name: str, key: str | None) -> bool:
    wanted = getattr(cfg, f"use_{name}")
    return bool(wanted) if wanted is not None or key is None else bool(getattr(cfg, key))


def without_trackers(cfg: Any) -> Any:
    """The config of a trainer that reports to none."""
    from strategies.config.trainer import TrackerKeys

    return cfg.model_copy(update=dict.fromkeys(TrackerKeys.model_fields))


def tracker_arguments(cfg: Any) -> dict[str, Any]:
    """Arguments that name the trackers (`report_to`, none by default), the run and the project."""
    names = (cfg.wandb_name, cfg.mlflow_run_name, cfg.trackio_run_name)
    given = {
        "run_name": next((name for name in names if name), None),
        "project": cfg.trackio_project_name,
        "trackio_space_id": cfg.trackio_space_id,
    }
    return {"report_to": used_trackers(cfg), **{name: value for name, value in given.items() if value is not None}}


def tracker_environment(cfg: Any) -> dict[str, str]:
    """Environment variables that the trackers' keys stand for; `HFRLTrainerBuilder.build` sets them."""
    variables = {ENVIRONMENT[name]: str(getattr(cfg, name)) for name in ENVIRONMENT if getattr(cfg, name) is not None}
    if "WANDB_RUN_ID" in variables:
        variables["WANDB_RESUME"] = "allow"
    if cfg.use_tensorboard:
        variables["TENSORBOARD_LOGGING_DIR"] = f"{cfg.output_dir}/tensorboard"
    return variables
