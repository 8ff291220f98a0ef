"""MLflow: one run per run, and one per sweep in which its trials' runs are nested."""

from __future__ import annotations

import os
import re
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cluster.environment import environment
from pipeline.config import RunConfig
from pipeline.config.paths import is_in_job_package
from pipeline.errors import UserError
from pipeline.io.storage import inside
from pipeline.secrets import redact_text
from pipeline.tracking.tracker import EndStatus, Tracker, flatten, metrics_of

__all__ = ["TRACKER"]

STATUS: dict[EndStatus, str] = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
INTERACTIVE_TIMEOUT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""While the user waits for a run to start; MLflow by itself retries for minutes."""
MAX_PARAMS, MAX_METRICS = 100, 1000
"""MLflow's limits per request."""
FORBIDDEN = re.compile(r"[^\w\-. :/]")
"""Characters that names of metrics and parameters can't have."""


class MLflow(Tracker):
    """Reports to MLflow through its client, which shares no state with other runs of this process."""

    label = "MLflow"
    package = "mlflow"
    name_key = "mlflow_run_name"
    variables = ("MLFLOW_", "DATABRICKS_")
    nests_trials = True
    upload_key = "hf_mlflow_log_artifacts"

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise UserError with the reason when the server is unreachable or refuses access."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        where = cfg.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if is_in_job_package() and not where:
            raise UserError("mlflow_tracking_uri: a job's own folder is deleted after it; give a server, or an absolute path")
        try:
            with _fail_fast():
                MlflowClient(cfg.mlflow_tracking_uri).search_experiments(max_results=1)
        except (MlflowException, OSError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"use_mlflow: MLflow can't be reached at {where or 'the default place'!r}: {why}") from error

    def start(self) -> None:
        """Begin the run, or resume the one of the same id."""
        from mlflow import MlflowClient

        self._client = MlflowClient(self.cfg.mlflow_tracking_uri)
        with _fail_fast():
            if "id" in self.saved:
                # Otherwise MLflow would show the run as ended while it trains.
                self._client.update_run(self.saved["id"], status="RUNNING")
            else:
                self.saved = {"id": self._create()}
            self._id = self.saved["id"]
            experiment, uri = self._client.get_run(self._id).info.experiment_id, redact_text(self._client.tracking_uri)
        is_server = uri.startswith("http")
        self.link = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}" if is_server else uri

    def _create(self) -> str:
        from mlflow.entities import Param
        from mlflow.tracking.context.registry import resolve_tags

        name = self.cfg.mlflow_experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        tags = {"mlflow.source.name": "prefray"}
        if self.trial is not None:
            tags["sweep"] = self.group or ""
            if "mlflow" in self.trial.parents:
                tags["mlflow.parentRunId"] = self.trial.parents["mlflow"]
        # The client adds no tags by itself: user, source and commit come from MLflow's context.
        run = self._client.create_run(experiment_id, tags=resolve_tags(tags), run_name=self.name)
        params = [Param(FORBIDDEN.sub("_", key), str(value)) for key, value in flatten(self.recipe()).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[start : start + MAX_PARAMS])
        return run.info.run_id

    def log(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(FORBIDDEN.sub("_", name), value, int(1000 * record.get("time", time.time())), record["step"])
            for record in records
            for name, value in metrics_of(record).items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + MAX_METRICS])

    def add_checkpoint(self, name: str) -> None:
        if self.uploads_models():
            folder = inside(self.folder.where, name)
            # The recipe's rules refuse the upload for a run at a URI, from which MLflow can't read.
            assert isinstance(folder, Path)
            self._client.log_artifacts(self._id, str(folder), name)

    def add_result(self, metrics: dict[str, float], files: dict[str, str]) -> None:
        for name, value in metrics.items():
            self._client.log_metric(self._id, FORBIDDEN.sub("_", f"best/{name}"), value)
        for name, text in files.items():
            self._client.log_text(self._id, text, name)

    def finish(self, status: EndStatus) -> None:
        self._client.set_terminated(self._id, STATUS[status])


def _fail_fast() -> AbstractContextManager[None]:
    return environment({name: value for name, value in INTERACTIVE_TIMEOUT.items() if name not in os.environ})


TRACKER = MLflow
