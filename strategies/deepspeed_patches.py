"""Patches of DeepSpeed 0.19.8; `tests/strategies/test_deepspeed_patches.py` says when one is no longer needed."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

__all__ = ["SHARED_MEMORY", "keep_float32_weights_once", "talk_through_gloo"]

SHARED_MEMORY = "deepspeed_shm_comm"


def keep_float32_weights_once() -> None:
    """Let ZeRO-3 keep weights that are float32 already once, not twice; idempotent.

    Its optimizer shares them with the model where `tensor.device == self.device` (`_create_fp32_partitions` of
    `runtime/zero/stage3.py`). But `self.device` is text there ("cpu", "cuda:0"), which no device equals: they are copied.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    original = DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def create(self: Any) -> None:
        named = self.device
        self.device = torch.device(named)
        try:
            original(self)
        finally:
            self.device = named

    DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions = create


def talk_through_gloo() -> None:
    """Don't compile DeepSpeed's shared-memory collectives for CPUs.

    A worker that is killed while it compiles or loads them leaves a lock file in the user's cache, for which every later run
    waits without end; and peers of one that is killed in such a collective wait for its flags in memory.
    """
    from deepspeed import ops

    ops.__compatible_ops__[SHARED_MEMORY] = False
