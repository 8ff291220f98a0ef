"""The page of a sweep: metrics over time, values against metrics, importance, Pareto front, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from pipeline.config.tuning import LISTS, TuneConfig
from pipeline.display import SHOWN
from pipeline.report.page import DASHES, SYMBOLS, Chart, Column, Fact, Page, Row, Section, Table, chart, render
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile
from pipeline.tuning.folder import SweepFolder, recipe_text
from pipeline.tuning.importance import importances
from pipeline.tuning.objectives import Measure, Objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.sharing import Saved, Shared
from pipeline.tuning.space import shown_value, shown_values
from pipeline.tuning.table import WORDS

if TYPE_CHECKING:
    from pipeline.tuning.result import SweepResult

__all__ = ["parallel_coordinates", "sweep_page"]

BEST_WIDTH, OTHER_WIDTH = 3.5, 1.5
SCALE = [[0, "#56b4e9"], [1, "#d55e00"]]
"""From bad to good, both visible on light and on dark paper."""


def sweep_page(result: SweepResult, folder: SweepFolder, shared: Shared) -> str:
    """The page as HTML."""
    assert result.cfg.tune is not None
    section, measure, records = result.cfg.tune, result.measure, result.records
    best = {record.number for record in result.front}
    saved = Saved.of(records, shared)
    sections = [_over_time(folder, records, measure, best)]
    evaluated = [record for record in records if record.metrics]
    if evaluated:
        sections += [_values(section, evaluated, measure), _compared(evaluated, measure, best)]
    sections += [_cost(records, saved), _trials(section, records, measure, best)]
    if result.best is not None:
        words = f"Trial {result.best.name}: `prefray train` takes best.yaml as it is."
        sections.append(Section("best", "Best recipe", words, text=recipe_text(result.best_config)))
    page = Page(f"Sweep of {result.run_dir}", _subtitle(section, measure), _facts(result, saved), sections)
    return render(page)


def _subtitle(section: TuneConfig, measure: Measure) -> str:
    goals = ", ".join(f"{one.metric} ({one.mode})" for one in measure.objectives)
    bounds = "; ".join(f"{name} within {_bounds(one)}" for name, one in measure.constraints.items())
    return f"Search {section.search}, scheduler {section.scheduler}, by {goals}" + (f"; {bounds}" if bounds else "") + "."


def _bounds(bounds: Any) -> str:
    low = "-inf" if bounds.min is None else f"{bounds.min:g}"
    high = "inf" if bounds.max is None else f"{bounds.max:g}"
    return f"[{low}, {high}]"


def _facts(result: SweepResult, saved: Saved) -> list[Fact]:
    counts = {status: sum(record.status == status for record in result.records) for status in ("finished", "stopped", "failed")}
    facts = [
        Fact("trials", str(len(result.records))),
        Fact("finished, ended early, failed", f"{counts['finished']}, {counts['stopped']}, {counts['failed']}"),
        Fact("tokens trained", f"{saved.tokens:,}"),
        Fact("steps that weren't needed", f"{saved.steps_left:,} of {saved.steps:,}"),
    ]
    if result.best is not None:
        first = result.measure.first.metric
        facts.insert(0, Fact(f"best {_label(first)} (trial {result.best.name})", _number(result.best.metrics[first])))
    return facts


def _over_time(folder: SweepFolder, records: Sequence[TrialRecord], measure: Measure, best: set[int]) -> Section:
    histories = {record.number: _history(folder, record) for record in records}
    goals = [one.metric for one in measure.objectives]
    names = dict.fromkeys(name for rows in histories.values() for row in rows for name in row)
    watched = [name for name in ("eval_kl", "eval_answer_length", *measure.constraints) if name in names]
    charts = [_lines(records, histories, name, best) for name in dict.fromkeys((*goals, *watched))]
    words = "One line per trial; the best is thick, the recipe's own values are trial 0. eval_kl is the mean log-ratio to the "
    words += "reference: it shows a policy that leaves it."
    return Section("time", "Metrics over time", words, charts)


def _history(folder: SweepFolder, record: TrialRecord) -> list[dict[str, Any]]:
    if record.folder is None:
        return []
    rows = MetricsFile(RunFolder(folder.trial(record.folder)).metrics).read()
    return [row for row in rows if any(name.startswith("eval_") for name in row)]


def _lines(records: Sequence[TrialRecord], histories: dict[int, list[dict[str, Any]]], metric: str, best: set[int]) -> Chart:
    figure = go.Figure()
    for place, record in enumerate(records):
        rows = [row for row in histories[record.number] if row.get(metric) is not None]
        if not rows:
            continue
        figure.add_scatter(
            x=[row["step"] for row in rows],
            y=[row[metric] for row in rows],
            name=f"trial {record.name}",
            mode="lines+markers",
            line={"dash": DASHES[place % len(DASHES)], "width": BEST_WIDTH if record.number in best else OTHER_WIDTH},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)], "size": 7},
            hovertext=shown_values(record.values),
        )
    figure.update_xaxes(title="step")
    return chart(figure, _label(metric), height=420)


def _values(section: TuneConfig, records: Sequence[TrialRecord], measure: Measure) -> Section:
    charts = []
    searched = [record for record in records if record.values is not None]
    if len(searched) >= 2:
        figure = parallel_coordinates(section, searched, measure)
        charts.append(chart(figure, "Parallel coordinates", wide=True, height=420, top=100))
    words = "Each line of the parallel coordinates is a trial; drag along an axis to select."
    found = importances(section, searched, measure.first)
    if found:
        charts.append(_bars(found, measure.first))
        words += " Importance: how much of the metric's variance a key explains among the better trials (PED-ANOVA, arXiv "
        words += "2304.10255); with few trials it is a hint, not a proof."
    else:
        words += " There are too few trials, or too little difference between them, to say which key matters."
    return Section("values", "Values and what they do", words, charts)


def parallel_coordinates(section: TuneConfig, records: Sequence[TrialRecord], measure: Measure) -> go.Figure:
    """Values and metrics of trials, an axis each; keys that have one value are left out."""
    keys = [key for key in section.space if len({json.dumps((record.values or {}).get(key)) for record in records}) > 1]
    axes = [_axis(section, key, [(record.values or {}).get(key) for record in records]) for key in keys]
    for objective in measure.objectives:
        values = [record.metrics.get(objective.metric, math.nan) for record in records]
        axes.append({"label": _label(objective.metric), "values": values})
    score = [record.metrics.get(measure.first.metric, math.nan) for record in records]
    line = {"color": score, "colorscale": SCALE, "showscale": True, "reversescale": measure.first.mode == "min"}
    return go.Figure(go.Parcoords(dimensions=axes, line=line))


def _axis(section: TuneConfig, key: str, values: Sequence[Any]) -> dict[str, Any]:
    """A dimension of the parallel coordinates: text on ticks, wide ranges by their logarithm, what isn't set at the bottom."""
    kinds = {one.kind for one in section.space[key]}
    are_numbers = all(type(value) in (int, float) for value in values)
    if kinds <= {*LISTS} or not are_numbers:
        texts = list(dict.fromkeys("-" if value is None else shown_value(value) for value in values))
        texts.sort(key=lambda text: (text != "-", _as_number(text), text))
        places = [texts.index("-" if value is None else shown_value(value)) for value in values]
        return {"label": key, "values": places, "tickvals": list(range(len(texts))), "ticktext": texts}
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


def _bars(found: dict[str, float], objective: Objective) -> Chart:
    names = sorted(found, key=lambda name: found[name])
    shares = [found[name] for name in names]
    figure = go.Figure(go.Bar(x=shares, y=names, orientation="h", text=[f"{share:.0%}" for share in shares]))
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(automargin=True)
    return chart(figure, f"Importance for {_label(objective.metric)}", wide=True, height=140 + 36 * len(names))


def _compared(records: Sequence[TrialRecord], measure: Measure, best: set[int]) -> Section:
    """Two metrics against each other: the Pareto front of several objectives, else the metric against the drift."""
    objectives = list(measure.objectives)
    front = len(objectives) > 1
    others = objectives[1:] if front else [Objective(name, "min") for name in ("eval_kl",) if name in measure.reported]
    charts = [_scatter(records, measure.first, other, best, front) for other in others]
    words = "Trials on the line are the Pareto front: none is better in one metric without being worse in another."
    if not front:
        words = "What a trial's score has cost in distance from the reference."
    return Section("front", "Pareto front" if front else "Score and drift", words, charts)


def _scatter(records: Sequence[TrialRecord], one: Objective, other: Objective, best: set[int], front: bool) -> Chart:
    known = [record for record in records if one.metric in record.metrics and other.metric in record.metrics]
    figure = go.Figure()
    for name, symbol, chosen in (
        ("on the front" if front else "best", "star", [record for record in known if record.number in best]),
        ("others", "circle", [record for record in known if record.number not in best]),
    ):
        chosen = sorted(chosen, key=lambda record: record.metrics[other.metric])
        figure.add_scatter(
            x=[record.metrics[other.metric] for record in chosen],
            y=[record.metrics[one.metric] for record in chosen],
            text=[str(record.number) for record in chosen],
            hovertext=[shown_values(record.values) for record in chosen],
            textposition="top center",
            mode="lines+markers+text" if front and symbol == "star" else "markers+text",
            marker={"symbol": symbol, "size": 12 if symbol == "star" else 9},
            name=name,
        )
    figure.update_xaxes(title=_label(other.metric))
    figure.update_yaxes(title=_label(one.metric))
    return chart(figure, f"{_label(one.metric)} against {_label(other.metric)}", height=420)


def _cost(records: Sequence[TrialRecord], saved: Saved) -> Section:
    names = [f"trial {record.name}" for record in records]
    charts = []
    for title, values, left in (
        ("Steps", [record.step for record in records], [max(record.total_steps - record.step, 0) for record in records]),
        ("Seconds", [round(record.seconds, 1) for record in records], None),
    ):
        figure = go.Figure(go.Bar(x=names, y=values, name="trained" if left else "spent"))
        if left is not None and any(left):
            figure.add_bar(x=names, y=left, name="not needed", marker={"pattern": {"shape": "/"}, "opacity": 0.45})
        figure.update_layout(barmode="stack")
        charts.append(chart(figure, title))
    return Section("cost", "Cost, and what sharing has saved", " ".join(saved.sentences()), charts)


def _trials(section: TuneConfig, records: Sequence[TrialRecord], measure: Measure, best: set[int]) -> Section:
    keys = list(section.space)
    names = [*(one.metric for one in measure.objectives), *measure.constraints]
    columns = [Column("trial", is_text=True), Column("status", is_text=True), *(Column(key) for key in keys), Column("step")]
    columns += [Column(_label(name)) for name in names] + [Column("tokens"), Column("time"), Column("notes", is_text=True)]
    rows = []
    for record in records:
        values = ["recipe" if record.values is None else shown_value(record.values.get(key, "")) for key in keys]
        metrics = [_number(record.metrics[name]) if name in record.metrics else "" for name in names]
        outside = [] if measure.allows(record.metrics) or not record.metrics else ["outside the constraints"]
        notes = [*(f"went on from {origin}" for origin in record.origins), record.reason, *outside]
        cost = [f"{record.tokens:,}", str(timedelta(seconds=round(record.seconds)))]
        status = WORDS.get(record.status, record.status)
        steps = f"{record.step}/{record.total_steps}"
        rows.append(
            Row([record.name, status, *values, steps, *metrics, *cost, "; ".join(filter(None, notes))], record.number in best)
        )
    return Section("trials", "Trials", table=Table(columns, rows))


def _label(metric: str) -> str:
    return SHOWN.get(metric, metric)


def _number(value: float) -> str:
    return f"{value:.4g}"
