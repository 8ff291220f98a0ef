"""TensorBoard: event files in `tensorboard/` of the run's folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from pipeline.tracking.run import Status, TrackedRun, flat, metrics_of, recipe_of
from pipeline.training.copying import FolderCopy

__all__ = ["ToTensorBoard"]

FOLDER = "tensorboard"


class ToTensorBoard:
    """Writes event files; to a URI they are copied at evaluations, checkpoints and the end, for they grow."""

    label = "TensorBoard"

    def __init__(self) -> None:
        self.link: str | None = None
        self._evaluated: dict[str, float] = {}

    def start(self, run: TrackedRun) -> dict[str, Any]:
        """Open a new event file, beside those of the run's earlier attempts."""
        from tensorboardX import SummaryWriter

        if not run.kept:
            run.folder.delete(FOLDER)
        self._run, where = run, run.folder.where
        self._copy: FolderCopy | None = None
        if not isinstance(where, Path):
            local = Path(tempfile.mkdtemp(prefix="prefray-tensorboard-"))
            self._copy = FolderCopy(local, [FOLDER], run.folder.filesystem, run.folder.path)
            where = local
        # Names have whole seconds: one that is begun again soon would overwrite the file.
        self._writer = SummaryWriter(logdir=str(where / FOLDER), filename_suffix=f".{uuid4().hex[:8]}")
        if not run.kept:
            text = yaml.safe_dump(recipe_of(run.cfg), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```")
        self._writer.flush()
        self.link = f"tensorboard --logdir {run.folder.where}"
        return {"folder": FOLDER}

    def log(self, records: list[dict[str, Any]]) -> None:
        """Write and flush: a killed driver shall lose nothing."""
        for record in records:
            metrics = metrics_of(record)
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))
            self._evaluated.update({name: value for name, value in metrics.items() if name.startswith("eval_")})
        self._writer.flush()
        if any(name.startswith("eval_") for record in records for name in record):
            self._bring()

    def add_checkpoint(self, name: str) -> None:
        """Nothing but a copy."""
        self._bring()

    def finish(self, status: Status) -> None:
        """Close the file; a trial's values and last evaluation go to TensorBoard's table of them."""
        from tensorboardX.summary import hparams

        if self._run.member is not None:
            values = flat(dict(self._run.member.values)) if self._run.member.values else {}
            shown = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
            for summary in hparams({"trial": self._run.member.trial, **shown}, self._evaluated):
                self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._bring()

    def _bring(self) -> None:
        if self._copy is not None:
            self._copy.bring()
