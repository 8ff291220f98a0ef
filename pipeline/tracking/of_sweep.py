"""A sweep in trackers: the group of its trials. MLflow, which has no groups, gets a run that the trials' runs are nested in."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.config.secrets import redact_text
from pipeline.display import Display
from pipeline.errors import RunStopped, UserError
from pipeline.tracking.run import Status, name_of
from strategies.trackers import used_trackers

if TYPE_CHECKING:
    from pipeline.tracking.to_mlflow import MLflowSweep
    from pipeline.tuning.folder import SweepFolder

__all__ = ["SweepTracking"]


class SweepTracking:
    """While the context is open, the sweep runs; what it tells afterwards can fail without harm.

    Raises:
        UserError: when MLflow doesn't let the run begin.
    """

    def __init__(self, cfg: RunConfig, folder: SweepFolder, display: Display) -> None:
        self._folder, self._display = folder, display
        self._run: MLflowSweep | None = None
        if "mlflow" not in used_trackers(cfg):
            return
        from mlflow.exceptions import MlflowException

        from pipeline.tracking.to_mlflow import MLflowSweep

        self._errors = (MlflowException, OSError)
        try:
            self._run = MLflowSweep(cfg, name_of(folder.path), (folder.state() or {}).get("mlflow"))
        except self._errors as error:
            raise UserError(f"use_mlflow: MLflow can't begin the sweep's run: {redact_text(str(error))}") from error
        folder.write_state({"mlflow": self._run.id})
        display.note(f"MLflow: {self._run.link}")

    @property
    def parent(self) -> str | None:
        """MLflow's id of the sweep's run."""
        return None if self._run is None else self._run.id

    def __enter__(self) -> SweepTracking:
        return self

    def add(self, metrics: dict[str, float], names: list[str]) -> None:
        """The best trial's metrics, and files of the sweep's folder."""
        if (run := self._run) is not None:
            texts = {name: self._folder.storage.read(name) for name in names}
            self._try(lambda: run.add(metrics, {name: text for name, text in texts.items() if text is not None}))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if (run := self._run) is not None:
            was_stopped = isinstance(error, RunStopped | KeyboardInterrupt)
            status: Status = "finished" if error is None else "killed" if was_stopped else "failed"
            self._try(lambda: run.finish(status))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except self._errors as error:
            self._display.note(f"MLflow hasn't taken the end of the sweep: {redact_text(str(error))}")
