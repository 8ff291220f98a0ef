"""Observers."""

from __future__ import annotations

import pytest

from strategies.mixins.metrics import StepTimer


def test_the_timer_counts_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 100.0, 101.0])
    monkeypatch.setattr("strategies.mixins.metrics.time.perf_counter", lambda: next(clock))
    timer = StepTimer()
    for _ in range(2):
        timer.on_step_begin(None, None, None)
        timer.on_step_end(None, None, None)
    assert timer.take() == 4.0
    assert timer.take() == 0.0
