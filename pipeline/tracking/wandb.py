"""Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.io.storage import inside
from pipeline.tracking.tracker import EndStatus, Tracker, metrics_of

__all__ = ["TRACKER"]

EXIT_CODES: dict[EndStatus, int] = {"finished": 0, "failed": 1, "killed": 255}
"""W&B's end status of a run; 255 is its code for Ctrl-C."""
SENDS_NOTHING = ("offline", "dryrun", "disabled")
"""Modes that need no API key."""


class Wandb(Tracker):
    """Reports to W&B; its local files are in `wandb/` of the run's folder, unless WANDB_DIR is set."""

    label = "W&B"
    package = "wandb"
    name_key = "wandb_name"
    variables = ("WANDB_",)
    upload_key = "wandb_log_model"

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise UserError with a remedy if W&B would prompt for an API key."""
        import wandb

        if (cfg.wandb_mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in SENDS_NOTHING:
            return
        wandb.setup().settings.silent = True
        try:
            has_key = wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise UserError(f"use_wandb: {error}") from error
        if not has_key:
            raise UserError(
                "use_wandb: W&B has no API key here; set WANDB_API_KEY, log in with `wandb login`, or set wandb_mode: offline"
            )

    def start(self) -> None:
        """Begin the run, or resume the one of the same id."""
        import wandb

        folder, self._copy = self.local_folder("wandb")
        self._run = wandb.init(
            project=self.cfg.wandb_project or os.environ.get("WANDB_PROJECT", "prefray"),
            entity=self.cfg.wandb_entity,
            name=self.name,
            group=self.group,
            id=self.saved.get("id") or self.cfg.wandb_run_id or uuid4().hex[:8],
            # Not "must": the server knows nothing of a run that was offline when it was killed.
            resume="allow",
            # A sweep's actor runs several trials, and a notebook may have a run of its own open.
            reinit="create_new",
            config=self.recipe(),
            mode=self.cfg.wandb_mode,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self.saved, self.link = {"id": self._run.id}, self._run.settings.sync_dir if self._run.offline else self._run.url

    def log(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._run.log(metrics_of(record), step=record["step"])

    def add_checkpoint(self, name: str) -> None:
        if self.cfg.wandb_log_model == "checkpoint":
            self._store(name, f"checkpoint-{self._run.id}", name)

    def finish(self, status: EndStatus) -> None:
        """Upload the model of a finished run, if configured, and end the run."""
        if status == "finished" and self.uploads_models():
            self._store("model", f"model-{self._run.id}", "final")
        self._run.finish(exit_code=EXIT_CODES[status])
        if self._run.offline:
            # An offline run is uploaded later, from these files.
            self._copy()

    def _store(self, folder: str, artifact_name: str, alias: str) -> None:
        import wandb

        artifact = wandb.Artifact(artifact_name, type="model")
        location = inside(self.folder.where, folder)
        if isinstance(location, Path):
            artifact.add_dir(str(location))
        else:
            artifact.add_reference(location.partition("?")[0], checksum=False)
        self._run.log_artifact(artifact, aliases=[alias])


TRACKER = Wandb
