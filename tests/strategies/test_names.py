"""The names that recipes may use are those that transformers knows."""

from __future__ import annotations

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from strategies.config.names import CUSTOM_SCHEDULES, OPTIMIZERS, SCHEDULES


def test_optimizers() -> None:
    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}


def test_schedules() -> None:
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType} | set(CUSTOM_SCHEDULES)
