"""Time of a run by part of a step: waiting for data, forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["STEP_PARTS", "StepClock"]

STEP_PARTS = ("data", "generation", "forward", "backward", "optimizer", "other")
"""Parts of a step; `evaluation` and `save` are counted beside it."""


class StepClock(TrainerCallback):
    """Adds up the seconds of each part of training.

    On a GPU, parts are bounded by events in its stream, which are read once the GPU has passed them: nothing waits for it, and
    `data` is the time that it was idle. Otherwise they are bounded by the process's clock.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Steps since the last `take`."""
        self._on_gpu = torch.cuda.is_available()
        self._part: str | None = None
        self._began: Any = None
        self._ended: list[tuple[str, Any, Any, float]] = []

    def enter(self, part: str | None) -> None:
        """End the current part and begin another one; None stops the clock."""
        now = self.mark()
        if self._part is not None:
            self.add(self._part, self._began, now)
        self._part, self._began = part, now

    def add(self, part: str, began: Any, ended: Any, share: float = 1.0) -> None:
        """Add a share of the time between two marks."""
        self._ended.append((part, began, ended, share))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of a part, after which the former one continues."""
        former = self._part
        self.enter(name)
        try:
            yield
        finally:
            self.enter(former)

    def take(self) -> tuple[dict[str, float], int]:
        """Return the seconds by part and the steps since the last call. Parts that the GPU hasn't finished count next time."""
        steps, self.steps = self.steps, 0
        seconds: dict[str, float] = defaultdict(float)
        waiting = []
        for part, began, ended, share in self._ended:
            if not self._on_gpu:
                seconds[part] += share * (ended - began)
            elif ended.query():
                seconds[part] += share * began.elapsed_time(ended) / 1000
            else:
                waiting.append((part, began, ended, share))
        self._ended = waiting
        return dict(seconds), steps

    def mark(self) -> Any:
        """Return the current moment, on a GPU that of its stream."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _was(self, part: str) -> None:
        """Count the time since the part before as `part`."""
        self._part = part
        self.enter("other")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the forward; what precedes it in a step, such as KTO's estimate, is forwards as well."""
        self.enter("forward")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the optimizer's part; what follows is logging, callbacks, evaluation and saving."""
        self.steps += 1
        self.enter("other")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Count the log of steps as `other`, and not as part of an evaluation or checkpoint that follows."""
        # An evaluation logs too, and `on_evaluate` comes after that.
        if self._part is not None and "loss" in (logs or {}):
            self._was("other")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the time since the last part as evaluation."""
        if self._part is not None:
            self._was("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the time since the last part as saving."""
        if self._part is not None:
            self._was("save")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        self.enter(None)
