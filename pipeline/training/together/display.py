"""Progress of several runs at once: a table with a row for each, and lines with their names."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from pipeline.ui.console import table_of
from pipeline.ui.display import SHOWN, Display, SilentDisplay, metrics_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RunDisplay", "TogetherDisplay"]

SHOW_EVERY_S = 0.5
METRICS = ("loss", "reward", "rewards/accuracies", "eval_loss", "eval_reward", "eval_rewards/accuracies")
"""Columns of the table, where a run reports them."""
End = Literal["finished", "failed", "stopped"]
STYLES: dict[str, str] = {"finished": "green", "failed": "red", "stopped": "yellow"}


class TogetherDisplay:
    """Shows several runs in one display, which their threads take turns to use.

    Args:
        display: shows the table, and the lines of all.
        names: of the runs.
    """

    def __init__(self, display: Display, names: Sequence[str]) -> None:
        self.display = display
        self.runs = [RunDisplay(name, self) for name in names]
        self.lock = threading.RLock()
        self.is_training = False
        """Whether runs train beside each other; before, one after another is prepared."""
        self._shown = 0.0

    def begin_training(self) -> None:
        """Show the table from now on."""
        self.is_training = True
        self.display.stage(f"training {sum(run.end is None for run in self.runs)} runs")

    def note(self, text: str) -> None:
        """Print a message about several runs."""
        with self.lock:
            self.display.note(text)

    def show(self, always: bool = False) -> None:
        """Show the table as it is now, at most every `SHOW_EVERY_S`, or `always`."""
        if always or time.monotonic() - self._shown > SHOW_EVERY_S:
            self._shown = time.monotonic()
            with self.lock:
                self.display.show(self.table())

    def table(self) -> Table:
        """Return a table with one row per run: step, metrics, status."""
        seen = {name for run in self.runs for name in run.metrics}
        metrics = [name for name in METRICS if name in seen]
        rows = [[Text(cell, STYLES.get(run.end or "", "")) for cell in run.cells(metrics)] for run in self.runs]
        columns = ["run", "step", *(SHOWN[name] for name in metrics), "status"]
        return table_of(columns, rows, title="runs", left=("run", "status"), whole=("run", "step"))


class RunDisplay(SilentDisplay):
    """The display of one of the runs."""

    def __init__(self, name: str, shared: TogetherDisplay) -> None:
        self.name = name
        self.end: End | None = None
        self.metrics: dict[str, float] = {}
        """Last value of each."""
        self._shared, self._stage = shared, "waiting"
        self._step = self._total = 0

    def cells(self, metrics: Sequence[str]) -> list[str]:
        """Return the cells of its row."""
        steps = f"{self._step}/{self._total}" if self._total else ""
        values = [f"{self.metrics[name]:.4f}" if name in self.metrics else "" for name in metrics]
        return [self.name, steps, *values, self.end or self._stage]

    def finish(self, end: End, steps: int | None = None) -> None:
        """Show how the run has ended.

        Args:
            steps: optimizer steps of one that has finished.
        """
        self.end = end
        if steps is not None:
            self._step = self._total = steps

    def stage(self, name: str, total: int | None = None) -> None:
        """Show a stage: in the table while runs train, before as that of the command."""
        self._total = total or self._total
        if name == self._stage:
            return
        self._stage = name
        with self._shared.lock:
            shown = self._shared.display.log if self._shared.is_training else self._shared.display.stage
            shown(f"{self.name}: {name}")

    def progress(self, state: dict[str, Any]) -> None:
        """Show the progress over rows; runs are prepared one after another."""
        with self._shared.lock:
            self._shared.display.progress(state)

    def record(self, record: dict[str, Any]) -> None:
        """Keep a step's metrics for the table; where there is none, print them."""
        self._step = record["step"]
        self.metrics.update({name: value for name, value in record.items() if isinstance(value, int | float)})
        if line := metrics_line(record):
            with self._shared.lock:
                self._shared.display.log(f"{self.name}: step {self._step}/{self._total}  {line}")

    def note(self, text: str) -> None:
        """Print a message with the run's name."""
        self._shared.note(f"{self.name}: {text}")
