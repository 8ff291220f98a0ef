"""Notes when the trials of a sweep pass certain points, in the driver, their actors and the workers; a plugin of its recipe."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.training.driver import RunHooks
from pipeline.tuning import tuner
from pipeline.tuning.trial import TrialJob, TrialRun
from strategies import register_callback

__all__ = ["Mark", "marking", "read_marks"]

HOST_WORKER = "pipeline.training.host_worker"


class Mark(NamedTuple):
    """A point that a trial has passed."""

    trial: str
    """Name of its folder."""
    point: str
    pid: int
    time: float
    """Seconds since the epoch."""
    cpu: float
    """Processor time of the process until then."""


def mark(sweep: Path, trial: str, point: str) -> None:
    """Note a point, in a file of this process."""
    found = Mark(trial, point, os.getpid(), time.time(), time.process_time())
    with (sweep / f"marks-{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n")


def read_marks(sweep: Path) -> dict[str, dict[str, Mark]]:
    """Return trial -> point -> its first mark."""
    marks = [Mark(*json.loads(line)) for path in sweep.glob("marks-*.jsonl") for line in path.read_text().splitlines()]
    trials: dict[str, dict[str, Mark]] = {}
    for found in sorted(marks, key=lambda one: one.time):
        trials.setdefault(found.trial, {}).setdefault(found.point, found)
    return trials


class MarkingTrial(TrialRun):
    """Notes when Tune has given the actor a trial."""

    def setup(self, config: dict[str, Any], job: TrialJob) -> None:
        """A new actor."""
        super().setup(config, job)
        self._mark("actor")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The actor of an earlier trial."""
        done = super().reset_config(new_config)
        self._mark("actor")
        return done

    def _mark(self, point: str) -> None:
        mark(Path(str(self.job.sweep)), f"{self.number:03d}", point)


@dataclass(frozen=True)
class MarkingJob(TrialJob):
    """Notes where the run of a trial is."""

    def hooks(self, cfg: Any, *more: Any) -> RunHooks:
        """Those of the job, with marks."""
        found, where = super().hooks(cfg, *more), Path(cfg.output_dir)

        def pass_by(point: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def marked(*arguments: Any) -> Any:
                mark(where.parents[1], where.name, point)
                return work(*arguments)

            return marked

        return replace(
            found,
            check_recipe=pass_by("run", found.check_recipe),
            check_cluster=pass_by("folder", found.check_cluster),
            launch=pass_by("wanted", found.launch),
        )


@contextmanager
def marking() -> Iterator[None]:
    """Let sweeps of this process note their trials' points."""
    originals = tuner.TrialRun, tuner.TrialJob
    tuner.TrialRun, tuner.TrialJob = MarkingTrial, MarkingJob  # type: ignore[misc]
    try:
        yield
    finally:
        tuner.TrialRun, tuner.TrialJob = originals  # type: ignore[misc]


def mark_worker(host_worker: Any) -> None:
    """Let a host's worker note what it does for a trial."""
    from transformers import TrainerCallback

    original = host_worker.train_job

    class MarkSteps(TrainerCallback):
        def __init__(self, note: Callable[[str], None]) -> None:
            self.note = note

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.note("first step")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                self.note("last step")

    def train_job(job: Any, load_base: Any, announce: Any, *further: Any) -> Any:
        where = Path(job.cfg.output_dir)

        def note(point: str) -> None:
            mark(where.parents[1], where.name, point)

        def load(*arguments: Any) -> Any:
            note("tokenizer")
            return load_base(*arguments)

        def built(trainer: Any) -> None:
            note("trainer")
            trainer.add_callback(MarkSteps(note))
            announce(trainer)

        note("turn")
        try:
            return original(job, load, built, *further)
        finally:
            note("left")

    host_worker.train_job = train_job


@register_callback
def as_plugin(cfg: Any) -> None:
    """No callback: a plugin is loaded wherever the recipe is read, and must register something."""


if HOST_WORKER in sys.modules:
    mark_worker(sys.modules[HOST_WORKER])
