"""What a run and its continuation have to have in common."""

from __future__ import annotations

from typing import Any

from pipeline.config import RunConfig
from pipeline.config.secrets import redact
from strategies.config.trainer import TrackerKeys

__all__ = ["changed_settings"]

# What may differ between a run and its continuation: how long, how often, where, who is told; not what is trained. How a
# global batch is cut into workers and forwards may differ too, as long as its size stays.
MAY_DIFFER = {
    "dataloader_num_workers",
    "dataset_num_proc",
    "dataset_prepared_path",
    "eval_steps",
    "evals_per_epoch",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_rejected_fraction",
    "max_steps",
    "micro_batch_size",
    "nonfinite_loss",
    "num_epochs",
    "output_dir",
    "ray",
    "ray_num_workers",
    "reference",
    "resources_per_worker",
    "sample_packing",
    "save_steps",
    "save_total_limit",
    "saves_per_epoch",
    "tokens_per_forward",
    *TrackerKeys.model_fields,
}


def changed_settings(was: RunConfig, now: RunConfig) -> list[str]:
    """Settings, a line each, by which `now` would train something else than `was` did."""
    saved, given = _settings(was), _settings(now)
    different = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k) and k not in MAY_DIFFER)
    return [f"{key}: was {saved.get(key)!r}, is {given.get(key)!r}" for key in different]


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What a continuation is compared by: every key, and the global batch that follows from three of them."""
    batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.num_workers
    return {**redact(cfg.model_dump(mode="json", exclude_none=True)), "global batch": batch}
