"""TensorBoard: event files in `tensorboard/` of the run's folder."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import yaml

from pipeline.tracking.tracker import EndStatus, Tracker, flatten, metrics_of

__all__ = ["TRACKER"]

FOLDER = "tensorboard"


class TensorBoard(Tracker):
    """Writes event files. For a run at a URI they are written locally and copied at evaluations, checkpoints and the end."""

    label = "TensorBoard"
    package = "tensorboardX"

    def start(self) -> None:
        """Open a new event file, beside those of the run's earlier attempts."""
        from tensorboardX import SummaryWriter

        is_new = not self.saved
        if is_new:
            # Files of a run that was cleared: TensorBoard would draw both in one curve.
            self.folder.delete(FOLDER)
        folder, self._copy = self.local_folder(FOLDER)
        self._evaluated: dict[str, float] = {}
        # File names have whole seconds: a run that restarts within one would overwrite the file.
        self._writer = SummaryWriter(logdir=str(folder / FOLDER), filename_suffix=f".{uuid4().hex[:8]}")
        if is_new:
            text = yaml.safe_dump(self.recipe(), sort_keys=False, allow_unicode=True)
            self._writer.add_text("config", f"```yaml\n{text}```")
        self._writer.flush()
        self.saved, self.link = {"folder": FOLDER}, f"tensorboard --logdir {self.folder.where}"

    def log(self, records: list[dict[str, Any]]) -> None:
        """Write scalars, and flush so that a killed driver loses nothing."""
        evaluated: dict[str, float] = {}
        for record in records:
            metrics = metrics_of(record)
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))
            evaluated |= {name: value for name, value in metrics.items() if name.startswith("eval_")}
        self._evaluated |= evaluated
        self._writer.flush()
        if evaluated:
            self._copy()

    def add_checkpoint(self, name: str) -> None:
        """Copy the event files; TensorBoard stores no checkpoints."""
        self._copy()

    def finish(self, status: EndStatus) -> None:
        """Close the file; add a trial's values and last evaluation to TensorBoard's HParams table."""
        from tensorboardX.summary import hparams

        if self.trial is not None:
            values = {"trial": self.trial.trial, **(flatten(dict(self.trial.values)) if self.trial.values else {})}
            shown = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values.items()}
            for summary in hparams(shown, self._evaluated):
                self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._copy()


TRACKER = TensorBoard
