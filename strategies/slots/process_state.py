"""State that libraries keep once per process: each slot has its own, put in place for its turns."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from strategies.compat import accelerate_states

__all__ = ["ProcessState", "TorchRandom"]


class TorchRandom:
    """Random state of torch at a moment: the CPU's, and this worker's GPU's (to ask another GPU would take memory there)."""

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cpu, self._cuda = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None

    def put(self) -> None:
        """Make this the state of the process."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)

    def copy(self) -> TorchRandom:
        """Return a state that `used` moves on by itself."""
        return copy.copy(self)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context that draws from this state and moves it on; the process's own is as before on return."""
        outside = TorchRandom()
        self.put()
        try:
            yield
        finally:
            now = TorchRandom()
            self._cpu, self._cuda = now._cpu, now._cuda
            outside.put()


@dataclass(frozen=True)
class ProcessState:
    """Random states of Python, numpy and torch, whether torch records gradients, and accelerate's singletons."""

    python: Any
    numpy: Any
    torch_random: TorchRandom
    records_gradients: bool
    accelerate: list[dict[str, Any]]

    @classmethod
    def current(cls) -> ProcessState:
        """Return a copy of the state of this process."""
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),
            torch_random=TorchRandom(),
            records_gradients=torch.is_grad_enabled(),
            # Shallow copies: accelerate replaces their values, also lists.
            accelerate=[dict(shared) for shared in accelerate_states()],
        )

    def put(self) -> None:
        """Make this the state of the process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        self.torch_random.put()
        torch.set_grad_enabled(self.records_gradients)
        for shared, values in zip(accelerate_states(), self.accelerate, strict=True):
            # In place: every `Accelerator` has these dicts themselves.
            shared.clear()
            shared.update(values)
