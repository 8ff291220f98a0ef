"""What is shown while a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pexpect
import pytest
from rich.text import Text
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.ui.display import PlainDisplay, open_display

ROOT = Path(__file__).parents[2]


def test_outside_a_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display()
    assert isinstance(display, PlainDisplay)
    display.stage("starting 2 workers", total=10)
    display.record({"step": 1, "loss": 0.6931, "rewards/accuracies": 0.5, "tokens_per_second": 1234.5, "grad_norm": 3.0})
    display.record({"step": 1, "train_runtime": 3.0})
    display.note("saved checkpoint-000001")
    assert capsys.readouterr().err.splitlines() == [
        "starting 2 workers",
        "step 1/10  loss 0.6931  accuracy 0.5000  tokens/s 1234",
        "saved checkpoint-000001",
    ]


def test_rows_per_second_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before the first state doesn't count; a new stage counts anew."""
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("pipeline.ui.display.time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("pipeline.ui.display.PROGRESS_EVERY_S", 0)
    display = open_display()
    for stage in ("preparing data", "scoring the reference"):
        display.stage(stage)
        display.progress({"rows_done": 100, "rows_total": 1000})
        display.progress({"rows_done": 400, "rows_total": 1000})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["preparing data", "100 of 1000 rows"]
    assert lines[2] == "400 of 1000 rows  5.0 rows/s  0:02:00 left"
    assert lines[3:5] == ["scoring the reference", "100 of 1000 rows"]


def test_in_a_terminal_one_line_shows_it_all() -> None:
    """A real terminal: the live line has stage, steps, loss, accuracy, tokens/s and time left; notes stay above it."""
    script = (
        "from pipeline.ui.display import open_display; d = open_display(); d.stage('training', total=10)\n"
        "for step in (1, 2):\n"
        "    d.record({'step': step, 'loss': 0.6931, 'rewards/accuracies': 0.5, 'tokens_per_second': 1234.5})\n"
        "    input()\n"
        "d.note('saved checkpoint-000002'); d.close()"
    )
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    terminal = pexpect.spawn(sys.executable, ["-c", script], cwd=ROOT, env=environment, encoding="utf-8", dimensions=(24, 160))
    terminal.expect("training")
    terminal.expect("1/10.*loss")
    terminal.sendline()
    terminal.expect(r"2/10.*loss 0\.6931  accuracy 0\.5000  tokens/s 1234  0:00:0\d left")
    terminal.sendline()
    terminal.expect("saved checkpoint-000002")
    terminal.expect(pexpect.EOF)
    # What doesn't fit beside stage, steps and time is cut.
    environment["COLUMNS"] = "60"
    terminal = pexpect.spawn(sys.executable, ["-c", script], cwd=ROOT, env=environment, encoding="utf-8", dimensions=(24, 60))
    terminal.expect(r"training.*1/10.*loss.*… .*0:00:0\d")
    terminal.close()


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_result_is_printed_after_the_line_has_gone(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(PlainDisplay):
        def close(self) -> None:
            print("the line has gone")

    monkeypatch.setattr("pipeline.ui.display.open_display", lambda *_: Closing())
    monkeypatch.setattr("pipeline.cli.runs.load", lambda *_: None)
    monkeypatch.setattr(f"pipeline.{command}", lambda *_, **__: Text("the result"))
    assert CliRunner().invoke(app, [command, "recipe.yaml"]).stdout.splitlines()[:2] == ["the line has gone", "the result"]
