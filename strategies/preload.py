"""What a worker imports whatever its recipe says: where it is imported before workers are forked, each is spared the time.

accelerate imports DeepSpeed, which takes MLflow along for its autotuner, where that is installed: a second, for what no worker
uses. So MLflow is left out.
"""

from __future__ import annotations

import os
import sys

import torch

UNUSED = "mlflow"

if not torch.accelerator.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
if UNUSED in sys.modules:
    import deepspeed
else:
    sys.modules[UNUSED] = None  # type: ignore[assignment]  # an ImportError for who imports it
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules[UNUSED]

import peft  # noqa: E402, F401
import transformers.trainer  # noqa: E402, F401

import strategies.builder  # noqa: E402
import strategies.models  # noqa: E402
import strategies.sharding  # noqa: E402
import strategies.trainers.pair  # noqa: E402, F401
