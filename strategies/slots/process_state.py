"""State that libraries keep once per process: each slot has its own, put in place for its turns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies.compat import accelerate_states

__all__ = ["ProcessState"]


@dataclass(frozen=True)
class ProcessState:
    """Random states of Python, numpy and torch, whether torch records gradients, and accelerate's singletons."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None
    """Of this worker's GPU alone: to ask another one would take memory of it."""
    records_gradients: bool
    accelerate: list[dict[str, Any]]

    @classmethod
    def current(cls) -> ProcessState:
        """Return a copy of the state of this process."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            cpu=torch.get_rng_state(),
            cuda=torch.cuda.get_rng_state() if on_gpu else None,
            records_gradients=torch.is_grad_enabled(),
            # Shallow copies: accelerate replaces their values, also lists.
            accelerate=[dict(shared) for shared in accelerate_states()],
        )

    def put(self) -> None:
        """Make this the state of the process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        torch.set_grad_enabled(self.records_gradients)
        for shared, values in zip(accelerate_states(), self.accelerate, strict=True):
            # In place: every `Accelerator` has these dicts themselves.
            shared.clear()
            shared.update(values)
