"""What is optimised: strategies, builder, trainer, mixins. Imports neither ray nor pipeline nor cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strategies.builder import HFRLTrainerBuilder
    from strategies.dpo import DPOStrategy
    from strategies.trainer import AxolotlDPOTrainer
    from strategies.training import TrainDatasetMeta, train

__all__ = ["AxolotlDPOTrainer", "DPOStrategy", "HFRLTrainerBuilder", "TrainDatasetMeta", "train"]

_EXPORTS = {
    "AxolotlDPOTrainer": "strategies.trainer",
    "DPOStrategy": "strategies.dpo",
    "HFRLTrainerBuilder": "strategies.builder",
    "TrainDatasetMeta": "strategies.training",
    "train": "strategies.training",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the schema loads without torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
