"""The result of a finished run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Group

from pipeline.io.storage import Folder, Location, inside, locate
from pipeline.runs.finished import finished_run
from pipeline.runs.folder import FINDINGS, RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.ui.console import Printable, lines_of, table_of
from pipeline.ui.findings import NOTHING_RECORDED, Finding, finding_lines, healthy_text, read_finding

if TYPE_CHECKING:
    import pandas

__all__ = ["TrainResult", "load_run", "result_of"]

METRICS = (
    "loss",
    "reward",
    "kl",
    "rewards/accuracies",
    "rewards/margins",
    "eval_loss",
    "eval_reward",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
)


@dataclass(frozen=True)
class TrainResult(Printable):
    """Files and metrics of a finished run."""

    run_dir: Location
    """Folder of config, metrics, checkpoints and model: a Path, or a URI as text."""
    steps: int
    """Optimizer steps of the run."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of every metric."""
    report: Location | None = None
    """Path of the run's page; None where none was written."""

    @property
    def model_dir(self) -> Location:
        """The trained model or adapter, with its tokenizer."""
        return inside(self.run_dir, "model")

    @cached_property
    def history(self) -> pandas.DataFrame:
        """Metrics, one row per logging or evaluation step."""
        return MetricsFile(inside(self.run_dir, "metrics.jsonl")).table()

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What rules found in the run, errors first."""
        return tuple(read_finding(value) for value in self._findings.get("findings", []))

    @cached_property
    def _findings(self) -> dict[str, Any]:
        return Folder(self.run_dir).read_json(FINDINGS) or {}

    def __rich__(self) -> Group:
        history = self.history
        columns = {name: history[name].dropna() for name in METRICS if name in history}
        rows = [
            (name, *(f"{values.iloc[index]:.4f}" if len(values) else "nan" for index in (0, -1)))
            for name, values in columns.items()
        ]
        files = {
            "model": self.model_dir,
            "metrics": inside(self.run_dir, "metrics.jsonl"),
            "config": inside(self.run_dir, "config.yaml"),
            "report": self.report,
        }
        # Runs of earlier versions have no such file, or no number in it.
        recorded = self._findings.get("training_records", 1) if self._findings else 0
        healthy = healthy_text(self._findings["rules"]) if recorded else NOTHING_RECORDED
        found = [finding_lines(self.findings, healthy)] if self._findings else []
        table = table_of(("metric", "first", "last"), rows, title=f"{self.steps} steps")
        return Group(*found, table, lines_of(files, gap=1))


def load_run(run_dir: str) -> TrainResult:
    """Load the result of a finished run from its folder, a path or a URI.

    Raises:
        UserError: when there is no finished run.
    """
    folder, state = finished_run(run_dir, locate(run_dir))
    return result_of(folder, state["step"])


def result_of(folder: RunFolder, step: int, page: Location | None = None) -> TrainResult:
    """Read the result of a run of `step` steps."""
    metrics: dict[str, float] = {}
    for record in MetricsFile(folder.metrics).read():
        metrics.update({name: value for name, value in record.items() if name not in ("step", "time")})
    return TrainResult(folder.path, step, metrics, page)
