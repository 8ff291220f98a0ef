"""What is shown while a command runs."""

from __future__ import annotations

import pytest

from pipeline.display import PlainDisplay, open_display


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
