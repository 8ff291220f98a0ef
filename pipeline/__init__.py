"""How it flows: config, data, training on Ray, commands. The only package that composes the others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig, load_config
    from pipeline.conversion import Converted, convert
    from pipeline.data import Prepared, prepare, register_dataset_type
    from pipeline.data.preview import preview
    from pipeline.doctor.examination import examine
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.generate import Answers, generate
    from pipeline.evaluation.result import Evaluation
    from pipeline.jobs.handle import Job, submit
    from pipeline.merging.merge import MergeResult, merge
    from pipeline.reference import Scores, score
    from pipeline.report.writing import write_report
    from pipeline.training.driver import TrainResult, load_run, train
    from pipeline.tuning.sweep import SweepResult, tune

__all__ = [
    "Answers",
    "Converted",
    "Evaluation",
    "Job",
    "MergeResult",
    "Prepared",
    "RunConfig",
    "SamplingOptions",
    "Scores",
    "SweepResult",
    "TrainResult",
    "convert",
    "evaluate",
    "examine",
    "generate",
    "load_config",
    "load_run",
    "merge",
    "prepare",
    "preview",
    "register_dataset_type",
    "score",
    "submit",
    "train",
    "tune",
    "write_report",
]

_EXPORTS = {
    "Answers": "pipeline.evaluation.generate",
    "Converted": "pipeline.conversion",
    "Evaluation": "pipeline.evaluation.result",
    "Job": "pipeline.jobs.handle",
    "MergeResult": "pipeline.merging.merge",
    "Prepared": "pipeline.data",
    "RunConfig": "pipeline.config",
    "SamplingOptions": "pipeline.evaluation.answering",
    "Scores": "pipeline.reference",
    "SweepResult": "pipeline.tuning.sweep",
    "TrainResult": "pipeline.training.driver",
    "convert": "pipeline.conversion",
    "evaluate": "pipeline.evaluation.evaluate",
    "examine": "pipeline.doctor.examination",
    "generate": "pipeline.evaluation.generate",
    "load_config": "pipeline.config",
    "load_run": "pipeline.training.driver",
    "merge": "pipeline.merging.merge",
    "prepare": "pipeline.data",
    "preview": "pipeline.data.preview",
    "register_dataset_type": "pipeline.data",
    "score": "pipeline.reference",
    "submit": "pipeline.jobs.handle",
    "train": "pipeline.training.driver",
    "tune": "pipeline.tuning.sweep",
    "write_report": "pipeline.report.writing",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the config loads without torch and ray."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
