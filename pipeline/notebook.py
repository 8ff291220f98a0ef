"""What notebooks show: progress that moves, and what commands print as HTML."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from pipeline.config.secrets import redact_text
from pipeline.display import WAITING, Display, SilentDisplay, metrics_line
from pipeline.waiting import WatchedDisplay

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["NotebookDisplay", "default_display", "html_of"]

WIDTH = 110
CURVES = ("loss", "rewards/accuracies", "eval_loss", "eval_rewards/accuracies", "reward")
"""Metrics that are drawn while a run goes on, those that it reports."""
SIZE = (160, 36)
SHOWN_EVERY_S = 0.25


def html_of(print_it: Callable[[Console], None]) -> str:
    """What a function prints to a rich console, as HTML.

    Args:
        print_it: is called with the console.
    """
    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_jupyter=False)
    print_it(console)
    code = console.export_html(inline_styles=True, code_format="{code}").strip("\n")
    return f"<pre style='line-height:1.2;overflow-x:auto'>{code}</pre>"


def default_display() -> Display:
    """In a notebook one that shows progress there, elsewhere one that shows nothing."""
    return WatchedDisplay(NotebookDisplay()) if _in_notebook() else SilentDisplay()


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this; asks without importing IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


class NotebookDisplay:
    """One output that changes while a command runs: stage, progress bar, metrics, curves; notes below it."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._handle: Any = display(HTML(""), display_id=True)
        self._stage = ""
        self._done, self._total = 0, 0
        self._seen: dict[str, Any] = {}
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._notes: list[str] = []
        self._table = ""
        self._shown_at = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self._stage, self._done = name, 0
        self._total = total if total is not None else self._total
        self._update(always=True)

    def progress(self, state: dict[str, Any]) -> None:
        if state.get("waiting"):
            self.note(WAITING)
            return
        self._done, self._total = state["rows_done"], state["rows_total"] or 0
        self._update()

    def record(self, record: dict[str, Any]) -> None:
        self._seen.update(record)
        self._done = record["step"]
        for name in CURVES:
            if isinstance(record.get(name), int | float) and math.isfinite(record[name]):
                self._curves.setdefault(name, []).append((record["step"], record[name]))
        self._update()

    def saved(self, name: str) -> None:
        self.note(f"saved {name}")

    def note(self, text: str) -> None:
        self._notes.append(redact_text(text))
        self._update(always=True)

    def log(self, text: str) -> None: ...

    def show(self, table: Any) -> None:
        self._table = html_of(lambda console: console.print(table))
        self._update()

    def close(self) -> None:
        self._stage = "done"
        self._update(always=True)

    def _update(self, always: bool = False) -> None:
        """Show how things stand; not more often than an eye follows, and always what stays."""
        now = time.monotonic()
        if always or now - self._shown_at >= SHOWN_EVERY_S:
            self._shown_at = now
            self._handle.update(self._html(self._render()))

    def _render(self) -> str:
        counted = f"{self._done:,} of {self._total:,}" if self._total else ""
        bar = f"<progress value='{self._done}' max='{self._total}'></progress> " if self._total else ""
        head = f"<div>{bar}<b>{escape(self._stage)}</b> {counted} {escape(metrics_line(self._seen))}</div>"
        curves = "".join(_curve(name, points) for name, points in self._curves.items() if len(points) > 1)
        notes = "".join(f"<div style='opacity:.75;overflow-wrap:anywhere'>{escape(note)}</div>" for note in self._notes)
        return head + self._table + (f"<div>{curves}</div>" if curves else "") + notes


def _curve(name: str, points: list[tuple[int, float]]) -> str:
    """A line of a metric, from its first step to its last."""
    width, height = SIZE
    first, last = points[0], points[-1]
    points = [*points[:: -(-len(points) // width)], last]
    steps, values = [step for step, _ in points], [value for _, value in points]
    across, low = (steps[-1] - steps[0]) or 1, min(values)
    up = (max(values) - low) or 1.0
    places = " ".join(
        f"{2 + (width - 4) * (step - steps[0]) / across:.1f},{height - 2 - (height - 4) * (value - low) / up:.1f}"
        for step, value in points
    )
    line = f"<polyline points='{places}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
    label = f"{escape(name)} {first[1]:.4g} → {last[1]:.4g}"
    svg = f"<svg width='{width}' height='{height}' role='img' aria-label='{label}'>{line}</svg>"
    return f"<figure style='display:inline-block;margin:4px 16px 4px 0'>{svg}<figcaption>{label}</figcaption></figure>"
