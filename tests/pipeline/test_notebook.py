"""What notebooks are shown; that they are shown it while a run goes on, `tests/notebooks/` sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from IPython.core.interactiveshell import InteractiveShell
from rich.table import Table
from rich.text import Text

from pipeline.ui.console import html_of
from pipeline.ui.display import SilentDisplay
from pipeline.ui.notebook import NotebookDisplay, default_display


@pytest.fixture
def shell() -> Iterator[None]:
    """IPython, without a kernel."""
    InteractiveShell.instance()
    yield
    InteractiveShell.clear_instance()


def test_nothing_is_shown_outside_a_notebook() -> None:
    assert type(default_display()) is SilentDisplay


def test_what_is_printed_becomes_html() -> None:
    html = html_of(Text("a < b [x] :+1:", "bold"))
    assert "a &lt; b [x] :+1:" in html and "font-weight: bold" in html and "<html" not in html


def test_a_run_is_a_bar_its_metrics_and_curves(shell: None) -> None:
    shown = NotebookDisplay()
    shown.stage("training", total=4)
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.6)):
        shown.record({"step": step, "loss": loss, "time": 0.0})
    html = shown._render()
    assert "<progress value='3' max='4'>" in html and "3 of 4" in html and "loss 0.6000" in html
    assert "loss 0.7 → 0.6" in html and html.count("<svg") == 1
    points = html.split("points='")[1].split("'")[0].split()
    assert points[0] == "2.0,2.0" and points[1] == "80.0,34.0"  # the highest value first, the lowest in the middle
    shown.close()
    assert "<b>done</b>" in shown._render()


def test_rows_tables_and_notes(shell: None) -> None:
    shown = NotebookDisplay()
    shown.stage("preparing data")
    shown.progress({"stage": "prepare", "rows_done": 5, "rows_total": None})
    assert "<progress" not in shown._render()
    shown.progress({"stage": "score", "rows_done": 5, "rows_total": 10})
    shown.note("<script>alert(1)</script>")
    shown.saved("checkpoint-000004")
    table = Table("trial")
    table.add_row("<b>7")
    shown.show(table)
    html = shown._render()
    assert "5 of 10" in html and "&lt;script&gt;" in html and "saved checkpoint-000004" in html and "&lt;b&gt;7" in html
    assert "<script" not in html
    shown.progress({"waiting": "process 7 on node-3"})
    assert "process 7 on node-3 does the same work; waiting for its end" in shown._render()
