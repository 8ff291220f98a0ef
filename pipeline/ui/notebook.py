"""Progress in notebooks."""

from __future__ import annotations

import math
import sys
import time
from html import escape
from typing import Any

from pipeline.secrets import redact_text
from pipeline.ui.console import html_of
from pipeline.ui.display import Display, SilentDisplay, metrics_line, waiting_note
from pipeline.ui.waiting import WatchedDisplay

__all__ = ["NotebookDisplay", "default_display"]

CURVES = ("loss", "rewards/accuracies", "eval_loss", "eval_rewards/accuracies", "reward")
"""Metrics that are drawn as curves during a run, if it reports them."""
SIZE = (160, 36)
SHOWN_EVERY_S = 0.25


def default_display() -> Display:
    """Return a display that shows progress in a notebook, elsewhere nothing."""
    return WatchedDisplay(NotebookDisplay()) if _in_notebook() else SilentDisplay()


def _in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel, without importing IPython."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


class NotebookDisplay:
    """An output cell that is updated while a command runs: stage, progress bar, metrics, curves, notes."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        # One output that is updated; printing would add a line to the notebook for each step.
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
            self.note(waiting_note(state))
            return
        self._done, self._total = state["rows_done"], state["rows_total"] or 0
        self._update()

    def record(self, record: dict[str, Any]) -> None:
        self._seen.update(record)
        self._done = record["step"]
        for name in CURVES:
            # One NaN would make every coordinate of the curve NaN.
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
        self._table = html_of(table)
        self._update()

    def close(self) -> None:
        self._stage = "done"
        self._update(always=True)

    def _update(self, always: bool = False) -> None:
        """Render the current state, at most every `SHOWN_EVERY_S`, or `always`."""
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
    """Draw a metric over its steps, as SVG."""
    width, height = SIZE
    first, last = points[0], points[-1]
    points = [*points[:: -(-len(points) // width)], last]  # at most one point per pixel, and always the last
    steps, values = [step for step, _ in points], [value for _, value in points]
    # Never 0, by which the coordinates are divided.
    across, low = (steps[-1] - steps[0]) or 1, min(values)
    up = (max(values) - low) or 1.0
    coordinates = " ".join(
        f"{2 + (width - 4) * (step - steps[0]) / across:.1f},{height - 2 - (height - 4) * (value - low) / up:.1f}"
        for step, value in points
    )
    line = f"<polyline points='{coordinates}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
    label = f"{escape(name)} {first[1]:.4g} → {last[1]:.4g}"
    svg = f"<svg width='{width}' height='{height}' role='img' aria-label='{label}'>{line}</svg>"
    return f"<figure style='display:inline-block;margin:4px 16px 4px 0'>{svg}<figcaption>{label}</figcaption></figure>"
