"""Imports of every worker, independent of its recipe; imported before workers are forked, they cost no time in each.

accelerate imports DeepSpeed, which imports MLflow for its autotuner if it is installed: a second for a package that no worker
uses. So MLflow is blocked.
"""

from __future__ import annotations

import os
import sys

import torch

UNUSED = "mlflow"

# Else DeepSpeed tries to import the packages of each vendor's accelerators.
if not torch.accelerator.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
if UNUSED in sys.modules:
    import deepspeed
else:
    sys.modules[UNUSED] = None  # type: ignore[assignment]  # importing it raises ImportError
    try:
        import deepspeed  # noqa: F401
    finally:
        # So that a tracker can import it later.
        del sys.modules[UNUSED]

import peft  # noqa: E402, F401
import transformers.trainer  # noqa: E402, F401

import strategies.builder  # noqa: E402
import strategies.models.loading  # noqa: E402
import strategies.models.sharding  # noqa: E402
import strategies.trainers.pair  # noqa: E402, F401
