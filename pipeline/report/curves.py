"""What a run's metrics become on its page: training and evaluation of a metric in one chart."""

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
    "Tokens per second": ("tokens_per_second",),
}
"""Title -> metrics, by TRL's names; a run has those that its strategy reports, and others, which come after them."""
WORDS = (
    "Of the training batches (train) and of the evaluation rows (eval). Rewards are beta times the log-ratio of policy and "
    "reference; of a method without a reference, beta times the policy's mean log-probability of a token. Log-probabilities "
    "and kl are in nats."
)
UNITS = ("step", "time", "epoch", "num_tokens", "total_flos", "train_loss")
"""What records hold that is no metric of a step."""
MOST_POINTS = 1500
"""Of a line; of longer ones each point is a mean."""
SMOOTHED_FROM = 50
"""Points from which a training line has a running mean."""
MARKERS = 12


@dataclass(frozen=True)
class Line:
    """One metric, in training or of an evaluation set."""

    name: str
    evaluated: str | None
    """None in training, else the name of the evaluation set, or "" where there is one."""
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """Shape (points,); NaN where it wasn't finite."""

    def label(self, others: bool) -> str:
        """As a legend calls it; `others`: whether other metrics are in the chart."""
        where = "train" if self.evaluated is None else " ".join(filter(None, ("eval", self.evaluated)))
        return f"{self.name.rpartition('/')[2]} ({where})" if others else where


def curve_sections(records: Sequence[dict[str, Any]], restarts: Sequence[int]) -> list[Section]:
    """The charts of a run's records.

    Args:
        restarts: steps that the run went on from after it had ended or failed; each gets a vertical line.
    """
    lines = sorted(_lines(records), key=lambda line: line.evaluated is not None)
    known = {name for names in CHARTS.values() for name in names}
    charts = [
        _chart(title, [line for name in names for line in lines if line.name == name], restarts)
        for title, names in CHARTS.items()
    ]
    others = [name for name in dict.fromkeys(line.name for line in lines) if name not in known]
    more = [_chart(name, [line for line in lines if line.name == name], restarts) for name in others]
    words = WORDS + " Vertical lines mark steps that the run went on from." * bool(restarts)
    if not lines:
        return [Section("metrics", "Metrics", "No step was logged.")]
    sections = [Section("metrics", "Metrics", words, charts=[one for one in charts if one is not None])]
    if drawn := [one for one in more if one is not None]:
        sections.append(Section("more", f"{len(drawn)} more metrics", charts=drawn, is_folded=True))
    return sections


def _lines(records: Sequence[dict[str, Any]]) -> Iterator[Line]:
    names = dict.fromkeys(name for record in records for name in record if _is_metric(name))
    trained = [name for name in names if not name.startswith("eval_")]
    for name in names:
        known = [(record["step"], record[name]) for record in records if name in record]
        steps, values = zip(*known, strict=True)
        numbers = np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)
        metric, evaluated = _told_apart(name, trained)
        yield Line(metric, evaluated, np.array(steps), numbers)


def _is_metric(name: str) -> bool:
    timed = name.endswith(("runtime", "samples_per_second", "steps_per_second", "num_tokens"))
    return name not in UNITS and not timed


def _told_apart(name: str, trained: Sequence[str]) -> tuple[str, str | None]:
    """A metric's own name, and the evaluation set that it is of; of several sets the name stands between."""
    if not name.startswith("eval_"):
        return name, None
    rest = name.removeprefix("eval_")
    found = max((one for one in trained if rest == one or rest.endswith(f"_{one}")), key=len, default=rest)
    return found, rest.removesuffix(found).removesuffix("_")


def _chart(title: str, lines: Sequence[Line], restarts: Sequence[int]) -> Chart | None:
    """Lines that differ by colour, dashes and symbols; None where there are none."""
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return None
    figure = go.Figure()
    metrics = list(dict.fromkeys(line.name for line in lines))
    several = len(metrics) > 1
    for place, line in enumerate(lines):
        colour = COLOURS[(metrics.index(line.name) if several else place) % len(COLOURS)]
        _draw(figure, line, place, colour, line.label(several))
    for step in restarts:
        figure.add_vline(x=step, line={"dash": "dot", "width": 1.5, "color": "#888888"})
    figure.update_xaxes(title="step")
    figure.update_layout(showlegend=len(lines) > 1 or lines[0].evaluated is not None)
    return chart(figure, title, height=340)


def _draw(figure: go.Figure, line: Line, place: int, colour: str, label: str) -> None:
    steps, values = _thinned(line)
    smooth = line.evaluated is None and len(values) >= SMOOTHED_FROM
    marker = {"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7, "maxdisplayed": MARKERS, "color": colour}
    dashes = {"dash": DASHES[place % len(DASHES)], "color": colour}
    if smooth:
        faint = {"width": 1, "color": colour}
        figure.add_scatter(
            x=steps, y=values, name=label, mode="lines", line=faint, opacity=0.35, showlegend=False, hoverinfo="skip"
        )
        values, label = _running_mean(values, len(values) // 20), f"{label}, running mean"
    figure.add_scatter(x=steps, y=values, name=label, mode="lines+markers", line={**dashes, "width": 2}, marker=marker)


def _thinned(line: Line) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `MOST_POINTS` points, each the mean of as many as it stands for."""
    each = math.ceil(len(line.values) / MOST_POINTS)
    if each == 1:
        return line.steps.astype(np.float64), line.values
    starts = range(0, len(line.values), each)
    means = [(line.steps[start : start + each].mean(), line.values[start : start + each].mean()) for start in starts]
    steps, values = zip(*means, strict=True)
    return np.array(steps), np.array(values)


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of `width` points before and after each, of those that are there and finite."""
    finite = np.isfinite(values)
    window = np.ones(2 * width + 1)
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    counts = np.convolve(finite.astype(np.float64), window, mode="same")
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)
