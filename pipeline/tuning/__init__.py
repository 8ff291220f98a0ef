"""Sweeps: Ray Tune over training runs that share prepared data and reference scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.tuning.search import count_trials, drawn_points
    from pipeline.tuning.tuner import SweepTuner
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.tuning.search": "count_trials drawn_points",
            "pipeline.tuning.tuner": "SweepTuner",
        },
    )

__all__ = ["SweepTuner", "count_trials", "drawn_points"]
