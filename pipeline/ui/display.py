"""Progress of a command: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, Protocol

from pipeline.secrets import redact_text
from pipeline.ui.console import open_console

__all__ = [
    "Display",
    "PlainDisplay",
    "RichDisplay",
    "SilentDisplay",
    "clock_time",
    "metrics_line",
    "open_display",
    "waiting_note",
]

SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "eval_loss": "eval loss",
    "eval_reward": "eval reward",
    "eval_rewards/accuracies": "eval accuracy",
    "eval_rewards/margins": "eval margin",
    "tokens_per_second": "tokens/s",
}
"""Metric -> label on the progress line."""

PROGRESS_EVERY_S = 10.0
"""Seconds between plain lines of progress over rows."""


def waiting_note(state: dict[str, Any]) -> str:
    """Return the note of a progress state that names the process that is waited for."""
    return f"{state['waiting']} does the same work; waiting for its end"


def clock_time(seconds: float) -> str:
    """Format a time, in seconds since the epoch, as local H:M:S."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


class Display(Protocol):
    """Shows the progress of a command."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a stage of `total` steps."""

    def progress(self, state: dict[str, Any]) -> None:
        """Show a stage's progress: `rows_done` of `rows_total` (None: not known), in `unit`, rows by default."""

    def record(self, record: dict[str, Any]) -> None:
        """Show a step's training or evaluation record."""

    def saved(self, name: str) -> None:
        """Show that a checkpoint is complete."""

    def note(self, text: str) -> None:
        """Print a message that stays on the screen."""

    def log(self, text: str) -> None:
        """Print a message, unless the display shows tables, which contain it."""

    def show(self, table: Any) -> None:
        """Show a rich renderable in place of the one before."""

    def close(self) -> None:
        """End the display."""


def open_display(quiet: bool = False) -> Display:
    """Return a live display in a terminal, plain lines elsewhere or with `quiet`."""
    # stderr decides: stdout may be redirected while progress is watched.
    return RichDisplay() if sys.stderr.isatty() and not quiet else PlainDisplay()


class SilentDisplay:
    """Shows nothing."""

    def stage(self, name: str, total: int | None = None) -> None: ...
    def progress(self, state: dict[str, Any]) -> None: ...
    def record(self, record: dict[str, Any]) -> None: ...
    def saved(self, name: str) -> None:
        self.note(f"saved {name}")

    def note(self, text: str) -> None: ...
    def log(self, text: str) -> None: ...
    def show(self, table: Any) -> None: ...
    def close(self) -> None: ...


class _Clock:
    """Estimate of the time left, from the speed since the first step that was seen."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        # The first step that is seen, not step 0: a resumed run would seem infinitely fast.
        if self._first is None:
            self._first = (step, now)
        done = step - self._first[0]
        return (now - self._first[1]) / done * (total - step) if done > 0 else None


class _Speed:
    """Rows per second and time left of a stage, since its first state: cached rows and the actors' start don't count."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def shown(self, state: dict[str, Any]) -> str:
        done, total = state["rows_done"], state["rows_total"]
        left = self._clock.left(done, total) if total else None
        if not left:
            return ""
        speed = (total - done) / left
        unit = state.get("unit", "rows")
        return f"{speed:.{0 if speed >= 10 else 1}f} {unit}/s  {timedelta(seconds=round(left))} left"


def metrics_line(record: dict[str, Any]) -> str:
    """Format the metrics of a progress line."""
    shown = [f"{label} {_number(record[name])}" for name, label in SHOWN.items() if name in record]
    return "  ".join(shown)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.4f}"


class PlainDisplay:
    """One line per event, on stderr."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._clock = _Clock()
        self._stage: str | None = None
        self._last_progress = time.monotonic()
        self._speed = _Speed()

    def stage(self, name: str, total: int | None = None) -> None:
        self._total = total if total is not None else self._total
        self._speed = _Speed()
        if name != self._stage:
            self._line(name)
        self._stage = name

    def progress(self, state: dict[str, Any]) -> None:
        if state.get("waiting"):
            self.note(waiting_note(state))
            return
        speed, is_last = self._speed.shown(state), 0 < state["rows_done"] == state["rows_total"]
        if is_last or time.monotonic() - self._last_progress > PROGRESS_EVERY_S:
            self._last_progress = time.monotonic()
            total = f" of {state['rows_total']}" if state["rows_total"] else ""
            self._line(f"{state['rows_done']}{total} {state.get('unit', 'rows')}" + f"  {speed}" * bool(speed))

    def record(self, record: dict[str, Any]) -> None:
        metrics = metrics_line(record)
        if not metrics:
            return
        step, total = record["step"], self._total
        left = self._clock.left(step, total) if total else None
        tail = f"  {timedelta(seconds=round(left))} left" if left else ""
        self._line(f"step {step}/{total}  {metrics}{tail}" if total else f"step {step}  {metrics}")

    def saved(self, name: str) -> None:
        self.note(f"saved {name}")

    def note(self, text: str) -> None:
        self._line(text)

    log = note

    def show(self, table: Any) -> None: ...
    def close(self) -> None: ...

    def _line(self, text: str) -> None:
        # stderr: results go to stdout. Flushed, since a pipe would hold lines back for minutes.
        print(redact_text(text), file=sys.stderr, flush=True)


class RichDisplay:
    """A live line with stage, steps, metrics and time left, below an optional table; notes scroll above them."""

    def __init__(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self._console = open_console(stderr=True, soft_wrap=False)  # the live part has a known height
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            # What doesn't fit is cut here, so that stage, steps and time stay.
            TextColumn("{task.fields[metrics]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        self._table: Any = None
        # transient: the line disappears at the end, and the result is printed in its place.
        self._live = Live(get_renderable=self._render, console=self._console, transient=True, refresh_per_second=4)
        self._live.start()
        self._task = self._progress.add_task("", total=None, metrics="")
        self._total: int | None = None
        self._seen: dict[str, Any] = {}
        self._clock = _Clock()
        self._speed = _Speed()

    def stage(self, name: str, total: int | None = None) -> None:
        self._total = total if total is not None else self._total
        self._speed = _Speed()
        # rich takes None as no change, and its clock stops where a stage has reached its total.
        self._progress.tasks[0].total, self._progress.tasks[0].finished_time = self._total, None
        self._progress.update(self._task, description=name, completed=0, metrics="")

    def progress(self, state: dict[str, Any]) -> None:
        if state.get("waiting"):
            self.note(waiting_note(state))
            return
        speed = self._speed.shown(state)
        self._progress.update(self._task, total=state["rows_total"], completed=state["rows_done"], metrics=speed)

    def record(self, record: dict[str, Any]) -> None:
        # Merged: evaluation and training records have different metrics, and the line shows both.
        self._seen.update(record)
        left = self._clock.left(record["step"], self._total) if self._total else None
        tail = f"  {timedelta(seconds=round(left))} left" if left else ""
        self._progress.update(self._task, total=self._total, completed=record["step"], metrics=metrics_line(self._seen) + tail)

    def saved(self, name: str) -> None:
        self.note(f"saved {name}")

    def note(self, text: str) -> None:
        self._console.print(redact_text(text))

    def log(self, text: str) -> None: ...

    def show(self, table: Any) -> None:
        self._table = table

    def _render(self) -> Any:
        from rich.console import Group

        return Group(self._table, self._progress) if self._table is not None else self._progress

    def close(self) -> None:
        self._live.stop()
