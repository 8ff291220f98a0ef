"""`profile:`: a trace of some steps, by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

__all__ = ["PROFILES", "ProfileCallback"]

PROFILES = "profiles"
"""Folder of the traces, in the run's."""


class ProfileCallback(TrainerCallback):
    """Writes a trace of steps `first` to `last`, one file per rank, which chrome://tracing and Perfetto open.

    A run that resumes within them traces the remaining ones, in a file of its own; one that resumes after them traces nothing.

    Args:
        folder: of the run.
        first, last: steps from 1, both included.
    """

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self._folder = folder / PROFILES
        self._first, self._last = first, last
        self._profiler: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start with the first step that is wanted and not done yet."""
        step = state.global_step + 1
        if self._profiler is None and self._first <= step <= self._last:
            self._first = step
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the trace after the last step."""
        if state.global_step >= self._last:
            self._write(args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the trace of a run that has ended before the last step."""
        self._write(args, state.global_step)

    def _write(self, args: Any, step: int) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{self._first}-{step}.rank-{args.process_index}.json.gz"
        profiler.export_chrome_trace(str(self._folder / name))
        # The node's first rank copies the folder for all of its ranks at the end of training.
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
