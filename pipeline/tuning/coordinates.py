"""Parallel-coordinates plot of trials: one axis per searched key and per metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.tuning import LISTS, TuneConfig
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import shown_value
from pipeline.ui.display import SHOWN

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["metric_label", "parallel_coordinates"]

SCALE = [[0, "#56b4e9"], [1, "#d55e00"]]
"""From bad to good, both visible on light and on dark paper."""


def parallel_coordinates(section: TuneConfig, records: Sequence[TrialRecord], measure: SweepObjective) -> go.Figure:
    """Plot the values and metrics of trials, one axis each; keys with a single value are left out."""
    import plotly.graph_objects as go

    # Values may be lists, which aren't hashable: compared as JSON.
    keys = [key for key in section.space if len({json.dumps((record.values or {}).get(key)) for record in records}) > 1]
    axes = [_axis(section, key, [(record.values or {}).get(key) for record in records]) for key in keys]
    for objective in measure.objectives:
        values = [record.metrics.get(objective.metric, math.nan) for record in records]
        axes.append({"label": metric_label(objective.metric), "values": values})
    score = [record.metrics.get(measure.first.metric, math.nan) for record in records]
    line = {"color": score, "colorscale": SCALE, "showscale": True, "reversescale": measure.first.mode == "min"}
    return go.Figure(go.Parcoords(dimensions=axes, line=line))


def _axis(section: TuneConfig, key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return one axis: categories as ticks with unset values at the bottom, log-uniform ranges on a log scale."""
    kinds = {dimension.kind for dimension in section.space[key]}
    are_numbers = all(type(value) in (int, float) for value in values)
    if kinds <= {*LISTS} or not are_numbers:
        texts = list(dict.fromkeys("-" if value is None else shown_value(value) for value in values))
        texts.sort(key=lambda text: (text != "-", _as_number(text), text))
        positions = [texts.index("-" if value is None else shown_value(value)) for value in values]
        return {"label": key, "values": positions, "tickvals": list(range(len(texts))), "ticktext": texts}
    if "loguniform" in kinds and min(values) > 0:
        logs = [math.log10(value) for value in values]
        low, high = min(logs), max(logs)
        ticks = [low + (high - low) * part / 4 for part in range(5)]
        return {"label": key, "values": logs, "tickvals": ticks, "ticktext": [f"{10**tick:.2g}" for tick in ticks]}
    return {"label": key, "values": list(values)}


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def metric_label(metric: str) -> str:
    return SHOWN.get(metric, metric)
