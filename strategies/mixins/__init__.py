"""Parts of a trainer that change the step itself; whatever only watches is a callback.

Each is a `Trainer`, so that in `class T(A, B, DPOTrainer, D)` those before TRL's trainer override it, and `D`, after
it, overrides transformers' methods only where TRL has none of its own.
"""

from __future__ import annotations

from strategies.mixins.agreement import AgreementMixin, NonFiniteLossError
from strategies.mixins.checkpoint import CheckpointMixin
from strategies.mixins.distributed import DistributedParallelMixin
from strategies.mixins.metrics import MetricsMixin
from strategies.mixins.optimizer import OptimizerInitMixin, OptimizerMixin
from strategies.mixins.reference import SyncedReferenceMixin
from strategies.mixins.rng import RngLoaderMixin
from strategies.mixins.scheduler import SchedulerMixin

__all__ = [
    "AgreementMixin",
    "CheckpointMixin",
    "DistributedParallelMixin",
    "MetricsMixin",
    "NonFiniteLossError",
    "OptimizerInitMixin",
    "OptimizerMixin",
    "RngLoaderMixin",
    "SchedulerMixin",
    "SyncedReferenceMixin",
]
