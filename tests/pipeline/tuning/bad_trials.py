"""A plugin with which two learning rates don't bear others beside them: one wants too much memory, one kills its worker."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from transformers import TrainerCallback

from strategies import register_callback

GREEDY, DEADLY = 2e-4, 3e-4
AT_STEP = {GREEDY: 10, DEADLY: 13}


class Bad(TrainerCallback):
    def __init__(self, rate: float) -> None:
        self._rate = rate

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != AT_STEP[self._rate] or "pipeline.training.host_worker" not in sys.modules:
            return
        if self._rate == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.empty(2**50, dtype=torch.uint8)  # more than any machine has addresses for


@register_callback
def bad(cfg: Any) -> TrainerCallback | None:
    """For these learning rates alone."""
    return Bad(cfg.learning_rate) if cfg.learning_rate in AT_STEP else None
