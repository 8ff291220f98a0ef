"""One of several runs, from its preparation to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import RunCancelled, RunFailed, RunStopped
from pipeline.runs.result import TrainResult
from pipeline.training.driver import OpenRun, open_run
from pipeline.training.plan import TrainingPlan
from pipeline.training.together.display import RunDisplay
from pipeline.ui.display import Display

__all__ = ["Launch", "OneRun", "listed", "reason_of"]

Launch = Callable[[TrainingPlan, Display], dict[str, Any]]
"""As `RunHooks.launch`."""


class OneRun:
    """One of the runs. All but `train` is called by the thread that runs them all."""

    def __init__(self, cfg: RunConfig, display: RunDisplay) -> None:
        self.cfg, self.display = cfg, display
        self.context = ExitStack()
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        """Why it has no result, when it has ended."""
        self.has_trained = threading.Event()
        self._open = OpenRun()
        self._raised: BaseException | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.display.name

    @property
    def has_ended(self) -> bool:
        """Whether it has a result, or an error."""
        return self.result is not None or self.error is not None

    @property
    def plan(self) -> TrainingPlan:
        """Of a run that is ready to train."""
        assert self._open.plan is not None
        return self._open.plan

    def open(self, **options: Any) -> None:
        """Prepare and score; afterwards the run has ended, or is ready to train."""
        try:
            self._open = self.context.enter_context(open_run(self.cfg, display=self.display, **options))
        except Exception as error:  # noqa: BLE001 - what one run raises touches no other
            self._fail(error)
        else:
            if self._open.plan is None:
                self.close()

    def train(self, launch: Launch) -> None:
        """Train, in a thread of its own; `close` raises what it raises."""
        try:
            self._open.returned = launch(self.plan, self.display)
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            self._raised = error
        self.has_trained.set()

    def give_up(self, error: BaseException) -> None:
        """Don't train, unless it has."""
        if not self.has_trained.is_set():
            self._raised = error
            self.has_trained.set()

    def close(self) -> None:
        """End a run that has trained, or that had finished before."""
        try:
            with self.context:
                if self._raised is not None:
                    raise self._raised
            self.result = self._open.result
            assert self.result is not None
            self.display.finish("finished", self.result.steps)
        except BaseException as error:
            self._fail(error)
            # What one run raises touches no other; Ctrl-C is for all.
            if not isinstance(error, Exception):
                raise

    def _fail(self, error: BaseException) -> None:
        self.error = error
        has_stopped = isinstance(error, RunStopped | RunCancelled | KeyboardInterrupt)
        self.display.finish("stopped" if has_stopped else "failed")
        self.display.note(reason_of(error))


def listed(runs: Sequence[OneRun]) -> str:
    """Return the names of runs, for a sentence."""
    names = [run.name for run in runs]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def reason_of(error: BaseException) -> str:
    """Return the message of an error that has ended a run."""
    if isinstance(error, ValueError | RunFailed | RunStopped | RunCancelled):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    what = (str(error).strip().splitlines() or [""])[-1]
    return f"internal error: {type(error).__name__}: {what}"
