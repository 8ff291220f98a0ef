"""Metric charts of a run's page: training and evaluation of a metric in one chart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from pipeline.report.page import COLOURS, DASHES, SYMBOLS, Chart, Section, chart

__all__ = ["curve_sections"]

CHARTS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Reward": ("reward",),
    "Reward accuracy": ("rewards/accuracies",),
    "Reward margin": ("rewards/margins",),
    "Log-ratios of chosen and rejected": ("logratios/chosen", "logratios/rejected"),
    "Rewards of chosen and rejected": ("rewards/chosen", "rewards/rejected"),
    "Log-probabilities of chosen and rejected": ("logps/chosen", "logps/rejected"),
    "Distance from the reference (kl)": ("kl",),
    "Length of completions (tokens)": ("completions/mean_length", "completions/max_length", "answer_length"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
    "Tokens per second": ("tokens_per_second", "fed_tokens_per_second"),
    "Seconds per step": tuple(f"seconds/{part}" for part in ("step", "data", "generation", "forward", "backward", "optimizer")),
}
"""Title -> metrics by TRL's names. Metrics that aren't listed get charts of their own after these."""
WORDS = (
    "Of the training batches (train) and of the evaluation rows (eval). Rewards are beta times the log-ratio of policy and "
    "reference; of a method without a reference, beta times the policy's mean log-probability of a token. Log-probabilities "
    "and kl are in nats."
)
UNITS = ("step", "time", "epoch", "num_tokens", "total_flos", "train_loss")
"""Keys of records that aren't metrics of a step."""
MOST_POINTS = 1500
"""Most points of a line; longer ones are averaged down."""
SMOOTHED_FROM = 50
"""Number of points from which a training line gets a running mean."""
MARKERS = 12


@dataclass(frozen=True)
class Line:
    """One metric, of training or of an evaluation set."""

    name: str
    evaluated: str | None
    """None for training, else the name of the evaluation set, or "" if there is only one."""
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """Shape (points,); NaN for values that aren't finite."""

    def label(self, others: bool) -> str:
        """Return the legend's label; `others`: whether other metrics share the chart."""
        split = "train" if self.evaluated is None else " ".join(filter(None, ("eval", self.evaluated)))
        return f"{self.name.rpartition('/')[2]} ({split})" if others else split


def curve_sections(records: Sequence[dict[str, Any]], restarts: Sequence[int]) -> list[Section]:
    """Return the charts of a run's records.

    Args:
        restarts: steps that the run was resumed from; each gets a vertical line.
    """
    # Training first: it gets the first dashes and symbol of a chart.
    lines = sorted(_lines(records), key=lambda line: line.evaluated is not None)
    listed = {name for names in CHARTS.values() for name in names}
    charts = [
        _chart(title, [line for name in names for line in lines if line.name == name], restarts)
        for title, names in CHARTS.items()
    ]
    others = [name for name in dict.fromkeys(line.name for line in lines) if name not in listed]
    more = [_chart(name, [line for line in lines if line.name == name], restarts) for name in others]
    words = WORDS + " Vertical lines mark steps that the run went on from." * bool(restarts)
    if not lines:
        return [Section("metrics", "Metrics", "No step was logged.")]
    sections = [Section("metrics", "Metrics", words, charts=[drawn for drawn in charts if drawn is not None])]
    if extra_charts := [drawn for drawn in more if drawn is not None]:
        sections.append(Section("more", f"{len(extra_charts)} more metrics", charts=extra_charts, is_folded=True))
    return sections


def _lines(records: Sequence[dict[str, Any]]) -> Iterator[Line]:
    names = dict.fromkeys(name for record in records for name in record if _is_metric(name))
    trained = [name for name in names if not name.startswith("eval_")]
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        steps, values = zip(*points, strict=True)
        # Values that aren't finite are null in the file, since JSON has none.
        numbers = np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)
        metric, evaluated = _split_name(name, trained)
        yield Line(metric, evaluated, np.array(steps), numbers)


def _is_metric(name: str) -> bool:
    timed = name.endswith(("runtime", "samples_per_second", "steps_per_second", "num_tokens", "save_seconds"))
    return name not in UNITS and not timed


def _split_name(name: str, trained: Sequence[str]) -> tuple[str, str | None]:
    """Split `eval_SET_METRIC` into metric and evaluation set. Names of training metrics show where SET ends."""
    if not name.startswith("eval_"):
        return name, None
    rest = name.removeprefix("eval_")
    # The longest: a set's name may end as a shorter metric's does.
    metric = max((name for name in trained if rest == name or rest.endswith(f"_{name}")), key=len, default=rest)
    return metric, rest.removesuffix(metric).removesuffix("_")


def _chart(title: str, lines: Sequence[Line], restarts: Sequence[int]) -> Chart | None:
    """Draw lines that differ by colour, dashes and symbols; None if no line has finite values."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    figure = go.Figure()
    metrics = list(dict.fromkeys(line.name for line in lines))
    several = len(metrics) > 1
    for index, line in enumerate(lines):
        colour = COLOURS[(metrics.index(line.name) if several else index) % len(COLOURS)]
        _draw(figure, line, index, colour, line.label(several))
    for step in restarts:
        figure.add_vline(x=step, line={"dash": "dot", "width": 1.5, "color": "#888888"})
    figure.update_xaxes(title="step")
    # A single evaluation line needs one too, or it would look like training's.
    figure.update_layout(showlegend=len(lines) > 1 or lines[0].evaluated is not None)
    return chart(figure, title, height=340)


def _draw(figure: go.Figure, line: Line, index: int, colour: str, label: str) -> None:
    steps, values = _thinned(line)
    smooth = line.evaluated is None and len(values) >= SMOOTHED_FROM
    marker = {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7, "maxdisplayed": MARKERS, "color": colour}
    dashes = {"dash": DASHES[index % len(DASHES)], "color": colour}
    if smooth:
        faint = {"width": 1, "color": colour}
        figure.add_scatter(
            x=steps, y=values, name=label, mode="lines", line=faint, opacity=0.35, showlegend=False, hoverinfo="skip"
        )
        # A window of a tenth of the line, which is shorter than the line: `np.convolve` returns the longer of both.
        values, label = _running_mean(values, len(values) // 20), f"{label}, running mean"
    # Dashes and symbols beside colours: lines stay distinguishable in black and white.
    figure.add_scatter(x=steps, y=values, name=label, mode="lines+markers", line={**dashes, "width": 2}, marker=marker)


def _thinned(line: Line) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Downsample to at most `MOST_POINTS` points by averaging neighbours."""
    each = math.ceil(len(line.values) / MOST_POINTS)
    if each == 1:
        return line.steps.astype(np.float64), line.values
    starts = range(0, len(line.values), each)
    means = [(line.steps[start : start + each].mean(), line.values[start : start + each].mean()) for start in starts]
    steps, values = zip(*means, strict=True)
    return np.array(steps), np.array(values)


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of up to `width` points on each side, ignoring those that aren't finite."""
    finite = np.isfinite(values)
    window = np.ones(2 * width + 1)
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    # At the ends, and around missing values, fewer points are averaged.
    counts = np.convolve(finite.astype(np.float64), window, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
