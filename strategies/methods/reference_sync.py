"""TR-DPO (arXiv 2404.09656): the reference is updated towards the policy at intervals."""

from __future__ import annotations

from typing import Any

__all__ = ["SYNC_KEYS", "sync_arguments"]

SYNC_KEYS = frozenset({"trl.sync_ref_model", "trl.ref_model_mixup_alpha", "trl.ref_model_sync_steps"})


def sync_arguments(cfg: Any) -> dict[str, Any]:
    """Return the trainer's arguments of reference synchronisation; they have the keys' names."""
    names = [name.removeprefix("trl.") for name in sorted(SYNC_KEYS)]
    values = {name: getattr(cfg.trl, name) for name in names} if cfg.trl is not None else {}
    return {name: value for name, value in values.items() if value is not None}
