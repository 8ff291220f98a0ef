"""Config, data, training on Ray, commands. The only package that composes the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.api import train, train_together, tune
    from pipeline.config import RunConfig, load_config
    from pipeline.conversion import Converted, convert
    from pipeline.data.preparation import prepare
    from pipeline.data.preview import preview
    from pipeline.data.store import Prepared
    from pipeline.data.transforms.registry import register_dataset_type
    from pipeline.doctor.examination import examine
    from pipeline.evaluation.evaluate import evaluate
    from pipeline.evaluation.generate import Answers, generate
    from pipeline.evaluation.generate_on_ray import SamplingOptions
    from pipeline.evaluation.result import Evaluation
    from pipeline.inspection.inspect import inspect
    from pipeline.inspection.result import Inspection
    from pipeline.jobs.job import Job
    from pipeline.jobs.submission import submit
    from pipeline.merging.merge import merge
    from pipeline.merging.result import MergeResult
    from pipeline.reference.score_store import Scores
    from pipeline.reference.scoring import score
    from pipeline.report.inspection import write_inspection
    from pipeline.report.write import write_report
    from pipeline.runs.result import TrainResult, load_run
    from pipeline.tuning.saved import Sweep, open_sweep
    from pipeline.tuning.sweep import SweepResult
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.api": "train train_together tune",
            "pipeline.config": "RunConfig load_config",
            "pipeline.conversion": "Converted convert",
            "pipeline.data.preparation": "prepare",
            "pipeline.data.store": "Prepared",
            "pipeline.data.transforms.registry": "register_dataset_type",
            "pipeline.data.preview": "preview",
            "pipeline.doctor.examination": "examine",
            "pipeline.evaluation.evaluate": "evaluate",
            "pipeline.evaluation.generate": "Answers generate",
            "pipeline.evaluation.generate_on_ray": "SamplingOptions",
            "pipeline.evaluation.result": "Evaluation",
            "pipeline.inspection.inspect": "inspect",
            "pipeline.inspection.result": "Inspection",
            "pipeline.jobs.job": "Job",
            "pipeline.jobs.submission": "submit",
            "pipeline.merging.merge": "merge",
            "pipeline.merging.result": "MergeResult",
            "pipeline.reference.score_store": "Scores",
            "pipeline.reference.scoring": "score",
            "pipeline.report.inspection": "write_inspection",
            "pipeline.report.write": "write_report",
            "pipeline.runs.result": "TrainResult load_run",
            "pipeline.tuning.saved": "Sweep open_sweep",
            "pipeline.tuning.sweep": "SweepResult",
        },
    )

__all__ = [
    "Answers",
    "Converted",
    "Evaluation",
    "Inspection",
    "Job",
    "MergeResult",
    "Prepared",
    "RunConfig",
    "SamplingOptions",
    "Scores",
    "Sweep",
    "SweepResult",
    "TrainResult",
    "convert",
    "evaluate",
    "examine",
    "generate",
    "inspect",
    "load_config",
    "load_run",
    "merge",
    "open_sweep",
    "prepare",
    "preview",
    "register_dataset_type",
    "score",
    "submit",
    "train",
    "train_together",
    "tune",
    "write_inspection",
    "write_report",
]
