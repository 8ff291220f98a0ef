"""Settings that mustn't change when a run is resumed."""

from __future__ import annotations

from typing import Any

from pipeline.config import RunConfig
from pipeline.secrets import redact
from strategies.config.trainer import TrackerKeys

__all__ = ["changed_settings"]

# Settings that may change when a run is resumed: length, frequencies, folders, resources, trackers; not what is trained. The
# division of a global batch among workers and forwards may change too, as long as its size stays.
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
    "profile",
    "ray",
    "ray_num_workers",
    "reference",
    "resources_per_worker",
    "sample_packing",
    "save_steps",
    "save_total_limit",
    "template_date",
    "saves_per_epoch",
    "tokens_per_forward",
    *TrackerKeys.model_fields,
}


def changed_settings(was: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings that differ and mustn't, a line each.

    Args:
        was: config of the saved run.
        now: config to resume it with.
    """
    saved, new = _settings(was), _settings(now)
    different = sorted(k for k in saved.keys() | new.keys() if saved.get(k) != new.get(k) and k not in MAY_DIFFER)
    return [f"{key}: was {saved.get(key)!r}, is {new.get(key)!r}" for key in different]


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """Return the settings to compare: every key, and the size of the global batch, which follows from three of them."""
    batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.num_workers
    return {**redact(cfg.model_dump(mode="json", exclude_none=True)), "global batch": batch}
