"""What a person sees while a command runs: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, Protocol

from pipeline.config.secrets import redact_text

__all__ = ["Display", "PlainDisplay", "RichDisplay", "SilentDisplay", "clock_time", "metrics_line", "open_display"]

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
"""Metrics on the progress line, and what they are called there."""

PROGRESS_EVERY_S = 10.0
"""Plain lines about rows are at least this far apart."""
WAITING = "another run computes these scores; waiting for it"


def clock_time(seconds: float) -> str:
    """A moment, in seconds since the epoch, as a clock here shows it."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


class Display(Protocol):
    """Where a command says what it does."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins; `total` is the number of its steps."""

    def progress(self, state: dict[str, Any]) -> None:
        """A stage over rows, or what `unit` calls them, has come to `rows_done` of `rows_total` (None: not known)."""

    def record(self, record: dict[str, Any]) -> None:
        """A training or evaluation record of a step."""

    def saved(self, name: str) -> None:
        """A checkpoint is complete."""

    def note(self, text: str) -> None:
        """Something worth keeping on the screen."""

    def log(self, text: str) -> None:
        """Something that `show` shows as well, where that shows anything."""

    def show(self, table: Any) -> None:
        """What rich can render: how things stand, in place of what was shown before."""

    def close(self) -> None:
        """The command has ended."""


def open_display(quiet: bool = False) -> Display:
    """A live display in a terminal, plain lines elsewhere or with `quiet`."""
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
    """Time left, from the speed since the first step that was seen."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def left(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        done = step - self._first[0]
        return (now - self._first[1]) / done * (total - step) if done > 0 else None


class _Speed:
    """Rows per second and time left of a stage over rows, from the first state that was seen: what was there before it, and
    the start of what does the work, don't count."""

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
    """The metrics of a progress line."""
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
            self.note(WAITING)
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
        print(redact_text(text), file=sys.stderr, flush=True)


class RichDisplay:
    """A live line with stage, steps, metrics and time left, below a table if there is one; notes scroll above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._table: Any = None
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
        self._progress.update(self._task, description=name, total=self._total, completed=0, metrics="")

    def progress(self, state: dict[str, Any]) -> None:
        if state.get("waiting"):
            self.note(WAITING)
            return
        speed = self._speed.shown(state)
        self._progress.update(self._task, total=state["rows_total"], completed=state["rows_done"], metrics=speed)

    def record(self, record: dict[str, Any]) -> None:
        self._seen.update(record)
        left = self._clock.left(record["step"], self._total) if self._total else None
        tail = f"  {timedelta(seconds=round(left))} left" if left else ""
        self._progress.update(self._task, total=self._total, completed=record["step"], metrics=metrics_line(self._seen) + tail)

    def saved(self, name: str) -> None:
        self.note(f"saved {name}")

    def note(self, text: str) -> None:
        self._console.print(redact_text(text), markup=False, highlight=False)

    def log(self, text: str) -> None: ...

    def show(self, table: Any) -> None:
        self._table = table

    def _render(self) -> Any:
        from rich.console import Group

        return Group(self._table, self._progress) if self._table is not None else self._progress

    def close(self) -> None:
        self._live.stop()
