"""Weights & Biases."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.storage import inside
from pipeline.tracking.run import Status, TrackedRun, metrics_of, recipe_of
from pipeline.training.copying import FolderCopy

__all__ = ["ToWandb", "check"]

EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "killed": 255}
"""By which W&B tells how a run ended; the last one is its own for Ctrl-C."""
FOLDER = "wandb"
WITHOUT_KEY = ("offline", "dryrun", "disabled")
"""Modes that send nothing."""


def check(cfg: RunConfig) -> None:
    """Refuse to start where W&B would ask for a key.

    Raises:
        UserError: naming what to set.
    """
    import wandb

    if (cfg.wandb_mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in WITHOUT_KEY:
        return
    wandb.setup().settings.silent = True
    try:
        is_known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UserError(f"use_wandb: {error}") from error
    if not is_known:
        raise UserError(
            "use_wandb: W&B has no API key here; set WANDB_API_KEY, log in with `wandb login`, or set wandb_mode: offline"
        )


class ToWandb:
    """Reports to W&B; its local files are in `wandb/` of the run's folder, unless WANDB_DIR names another place."""

    label = "W&B"

    def __init__(self) -> None:
        self.link: str | None = None

    def start(self, run: TrackedRun) -> dict[str, Any]:
        """Begin the run, or go on with the one of the same id."""
        import wandb

        self._tracked, cfg = run, run.cfg
        self._copy: FolderCopy | None = None
        where = run.folder.where
        if not isinstance(where, Path):
            where = Path(tempfile.mkdtemp(prefix="prefray-wandb-"))
            self._copy = FolderCopy(where, [FOLDER], run.folder.filesystem, run.folder.path)
        self._run = wandb.init(
            project=cfg.wandb_project or os.environ.get("WANDB_PROJECT", "prefray"),
            entity=cfg.wandb_entity,
            name=run.name(cfg.wandb_name),
            group=run.group(cfg.wandb_name),
            id=run.kept.get("id") or cfg.wandb_run_id or uuid4().hex[:8],
            resume="allow",
            reinit="create_new",
            config=recipe_of(cfg),
            mode=cfg.wandb_mode,
            dir=os.environ.get("WANDB_DIR") or str(where),
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
        self.link = self._run.settings.sync_dir if self._run.offline else self._run.url
        return {"id": self._run.id}

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log each record at its optimizer step."""
        for record in records:
            self._run.log(metrics_of(record), step=record["step"])

    def add_checkpoint(self, name: str) -> None:
        """Store a checkpoint, if that is asked for."""
        if self._tracked.cfg.wandb_log_model == "checkpoint":
            self._store(name, f"checkpoint-{self._run.id}", [name])

    def finish(self, status: Status) -> None:
        """End the run; uploads what is left."""
        if status == "finished" and self._tracked.cfg.wandb_log_model in ("end", "checkpoint"):
            self._store("model", f"model-{self._run.id}", ["final"])
        self._run.finish(exit_code=EXIT_CODES[status])
        if self._copy is not None and self._run.offline:
            self._copy.bring()

    def _store(self, folder: str, name: str, aliases: list[str]) -> None:
        """A folder of the run as an artifact; what lies at a URI is only referred to."""
        import wandb

        artifact = wandb.Artifact(name, type="model")
        where = inside(self._tracked.folder.where, folder)
        if isinstance(where, Path):
            artifact.add_dir(str(where))
        else:
            artifact.add_reference(where.partition("?")[0], checksum=False)
        self._run.log_artifact(artifact, aliases=aliases)
