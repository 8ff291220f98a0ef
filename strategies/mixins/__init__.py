"""Mixins of the trainers, for what changes the step itself; pure observers are callbacks.

Each is a `Trainer`: in `class T(A, B, DPOTrainer, D)`, A and B override TRL's trainer, and D overrides transformers' methods
that TRL does not override.
"""

from __future__ import annotations

from strategies.mixins.checkpoint import CheckpointMixin
from strategies.mixins.distributed import DistributedParallelMixin
from strategies.mixins.ending import EndingMixin
from strategies.mixins.metrics import MetricsMixin
from strategies.mixins.optimizer import OptimizerInitMixin, OptimizerMixin
from strategies.mixins.reference import SyncedReferenceMixin
from strategies.mixins.rng import RngLoaderMixin
from strategies.mixins.scheduler import SchedulerMixin
from strategies.mixins.step_guard import AgreementMixin, NonFiniteLossError

__all__ = [
    "AgreementMixin",
    "CheckpointMixin",
    "DistributedParallelMixin",
    "EndingMixin",
    "MetricsMixin",
    "NonFiniteLossError",
    "OptimizerInitMixin",
    "OptimizerMixin",
    "RngLoaderMixin",
    "SchedulerMixin",
    "SyncedReferenceMixin",
]
