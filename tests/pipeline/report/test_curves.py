"""Records as charts: what stands together, what is thinned, what is left out."""

from __future__ import annotations

import math

import numpy as np

from pipeline.report import curves
from pipeline.report.curves import curve_sections


def lines(records: list[dict[str, float | None]]) -> dict[tuple[str, str | None], list[float]]:
    return {(line.name, line.evaluated): line.values.tolist() for line in curves._lines(records)}


def test_training_and_evaluations_of_a_metric_stand_together() -> None:
    records = [
        {"step": 1, "loss": 1.0, "nll_loss": 2.0, "time": 5.0, "epoch": 0.1, "num_tokens": 9.0},
        {"step": 1, "eval_easy_loss": 3.0, "eval_easy_nll_loss": 4.0, "eval_easy_runtime": 1.0},
        {"step": 2, "eval_loss": 5.0, "eval_kl": 6.0},
    ]
    assert lines(records) == {
        ("loss", None): [1.0],
        ("nll_loss", None): [2.0],
        ("loss", "easy"): [3.0],
        ("nll_loss", "easy"): [4.0],
        ("loss", ""): [5.0],
        ("kl", ""): [6.0],
    }


def test_what_is_not_finite_is_a_gap() -> None:
    (values,) = lines([{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]).values()
    assert math.isnan(values[1]) and (values[0], values[2]) == (1.0, 2.0)
    (section,) = curve_sections([{"step": 1, "loss": None}], [])
    assert section.charts == []


def test_metrics_that_have_no_chart_are_folded_away() -> None:
    sections = curve_sections([{"step": 1, "loss": 1.0, "entropy": 2.0, "rewards/brevity/mean": 3.0}], [1])
    assert [(section.title, len(section.charts), section.is_folded) for section in sections] == [
        ("Metrics", 1, False),
        ("2 more metrics", 2, True),
    ]
    assert "Vertical lines mark steps" in sections[0].words


def test_a_long_line_has_means_of_its_points() -> None:
    line = curves.Line("loss", None, np.arange(4000), np.arange(4000.0))
    steps, values = curves._thinned(line)
    assert len(steps) == len(values) == 1334
    assert (steps[0], values[0], values[-1]) == (1.0, 1.0, 3999.0)


def test_a_running_mean_skips_what_is_not_finite() -> None:
    values = np.array([1.0, math.nan, 3.0, 5.0])
    np.testing.assert_allclose(curves._running_mean(values, 1), [1.0, 2.0, 4.0, 4.0])


def test_no_step() -> None:
    (section,) = curve_sections([], [])
    assert section.words == "No step was logged."
