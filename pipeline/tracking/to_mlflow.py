"""MLflow: a run, and a run of a sweep that its trials are nested in."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.secrets import redact_text
from pipeline.errors import UserError
from pipeline.storage import inside
from pipeline.tracking.run import Status, TrackedRun, flat, metrics_of, recipe_of

__all__ = ["MLflowSweep", "ToMLflow", "check"]

STATUS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
HASTE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""While a person waits for a run to start; MLflow by itself tries for minutes."""
MOST_PARAMS, MOST_METRICS = 100, 1000
"""Of one request."""
FORBIDDEN = re.compile(r"[^\w\-. :/]")
"""In names of metrics and parameters."""


def check(cfg: RunConfig) -> None:
    """Refuse to start when the server can't be reached, or doesn't let us in.

    Raises:
        UserError: saying why, within seconds.
    """
    from mlflow.exceptions import MlflowException

    try:
        with _haste():
            _client(cfg).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        where = cfg.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "the default place")
        why = str(error).splitlines()[0]
        raise UserError(f"use_mlflow: MLflow can't be reached at {where!r}: {why}") from error


class ToMLflow:
    """Reports to MLflow through its client, which has no state that other runs of this process could share."""

    label = "MLflow"

    def __init__(self) -> None:
        self.link: str | None = None

    def start(self, run: TrackedRun) -> dict[str, Any]:
        """Begin the run, or go on with the one of the same id."""
        self._tracked, cfg = run, run.cfg
        self._client = _client(cfg)
        with _haste():
            if "id" in run.kept:
                self._id = run.kept["id"]
                self._client.update_run(self._id, status="RUNNING")
            else:
                self._id = self._begin(run)
            self.link = _link(self._client, self._id)
        return {"id": self._id}

    def _begin(self, run: TrackedRun) -> str:
        tags = {}
        if run.member is not None:
            tags["sweep"] = run.group(run.cfg.mlflow_run_name) or ""
            if run.member.parent is not None:
                tags["mlflow.parentRunId"] = run.member.parent
        return _begin(self._client, run.cfg, run.name(run.cfg.mlflow_run_name), tags)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log each record at its optimizer step."""
        from mlflow.entities import Metric

        metrics = [
            Metric(FORBIDDEN.sub("_", name), value, int(1000 * record.get("time", time.time())), record["step"])
            for record in records
            for name, value in metrics_of(record).items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MOST_METRICS])

    def add_checkpoint(self, name: str) -> None:
        """Copy a checkpoint, if that is asked for."""
        if self._tracked.cfg.hf_mlflow_log_artifacts:
            folder = inside(self._tracked.folder.where, name)
            assert isinstance(folder, Path)
            self._client.log_artifacts(self._id, str(folder), name)

    def finish(self, status: Status) -> None:
        """End the run."""
        self._client.set_terminated(self._id, STATUS[status])


class MLflowSweep:
    """The run of a sweep, which its trials' runs are nested in.

    Args:
        name: of the sweep.
        known: its id, where the sweep has been begun before.
    """

    def __init__(self, cfg: RunConfig, name: str, known: str | None) -> None:
        self._client = _client(cfg)
        with _haste():
            if known is not None:
                self._client.update_run(known, status="RUNNING")
            self.id = known or _begin(self._client, cfg, cfg.mlflow_run_name or name, {})
            self.link = _link(self._client, self.id)

    def add(self, metrics: dict[str, float], files: dict[str, str]) -> None:
        """The best trial's metrics, and files by their names."""
        for name, value in metrics.items():
            self._client.log_metric(self.id, FORBIDDEN.sub("_", f"best/{name}"), value)
        for name, text in files.items():
            self._client.log_text(self.id, text, name)

    def finish(self, status: Status) -> None:
        """End the run."""
        self._client.set_terminated(self.id, STATUS[status])


def _begin(client: Any, cfg: RunConfig, name: str, tags: dict[str, str]) -> str:
    """A new run with its recipe; returns its id."""
    from mlflow.entities import Param
    from mlflow.tracking.context.registry import resolve_tags

    wanted = cfg.mlflow_experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    found = client.get_experiment_by_name(wanted)
    experiment = found.experiment_id if found is not None else client.create_experiment(wanted)
    tags = resolve_tags({"mlflow.source.name": "prefray", **tags})
    begun = client.create_run(experiment, tags=tags, run_name=name).info.run_id
    params = [Param(FORBIDDEN.sub("_", key), str(value)) for key, value in flat(recipe_of(cfg)).items()]
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(begun, params=params[start : start + MOST_PARAMS])
    return begun


def _link(client: Any, run: str) -> str:
    uri, experiment = redact_text(client.tracking_uri), client.get_run(run).info.experiment_id
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run}" if uri.startswith("http") else uri


def _client(cfg: RunConfig) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(cfg.mlflow_tracking_uri)


@contextmanager
def _haste() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in HASTE}
    os.environ.update({**HASTE, **{name: value for name, value in before.items() if value is not None}})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
