"""How it flows: config, data, training on Ray, commands. The only package that composes the others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig, load_config
    from pipeline.data import Prepared, prepare
    from pipeline.merging.merge import MergeResult, merge
    from pipeline.reference import Scores, score
    from pipeline.training.driver import TrainResult, train
    from pipeline.tuning.sweep import SweepResult, tune

__all__ = [
    "MergeResult",
    "Prepared",
    "RunConfig",
    "Scores",
    "SweepResult",
    "TrainResult",
    "load_config",
    "merge",
    "prepare",
    "score",
    "train",
    "tune",
]

_EXPORTS = {
    "MergeResult": "pipeline.merging.merge",
    "Prepared": "pipeline.data",
    "RunConfig": "pipeline.config",
    "Scores": "pipeline.reference",
    "SweepResult": "pipeline.tuning.sweep",
    "TrainResult": "pipeline.training.driver",
    "load_config": "pipeline.config",
    "merge": "pipeline.merging.merge",
    "prepare": "pipeline.data",
    "score": "pipeline.reference",
    "train": "pipeline.training.driver",
    "tune": "pipeline.tuning.sweep",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the config loads without torch and ray."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
