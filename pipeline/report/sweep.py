"""Page of a sweep: metrics over time, values against metrics, importance, Pareto front, cost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from pipeline.config.tuning import TuneConfig
from pipeline.report.hosts import hosts_section
from pipeline.report.page import DASHES, SYMBOLS, Chart, Column, Fact, Page, Row, Section, Table, chart, render
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.tuning.coordinates import metric_label, parallel_coordinates
from pipeline.tuning.finalists import Finals
from pipeline.tuning.folder import SweepFolder, recipe_text
from pipeline.tuning.importance import importances
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import TrialRecord, keys_of
from pipeline.tuning.shared_stages import SharedStages, SweepSavings
from pipeline.tuning.space import shown_value, shown_values
from pipeline.tuning.table import WORDS, finalist_cells, relation

if TYPE_CHECKING:
    from pipeline.tuning.result import SweepResult

__all__ = ["sweep_page"]

BEST_WIDTH, OTHER_WIDTH = 3.5, 1.5


def sweep_page(result: SweepResult, folder: SweepFolder, shared: SharedStages) -> str:
    """Render the page of a sweep as HTML."""
    assert result.cfg.tune is not None
    section, measure, records = result.cfg.tune, result.measure, result.records
    best = {record.number for record in result.front}
    saved = SweepSavings.of(records, shared)
    # Repetitions of finalists have a section of their own.
    searched = [record for record in records if record.is_candidate]
    sections = [_over_time(folder, searched, measure, best)]
    sections = [*([_finalists(result.finals)] if result.finals is not None else []), *sections]
    # Without a metric a trial has no position in the charts of values.
    evaluated = [record for record in searched if record.metrics]
    if evaluated:
        sections += [_values(section, evaluated, measure), _compared(evaluated, measure, best)]
    if any(record.stays for record in records):
        sections.append(hosts_section(records, shared))
    sections += [_cost(records, saved), _trials(section, records, measure, best)]
    if result.best is not None:
        words = f"Trial {result.best.name}: `prefray train` takes best.yaml as it is."
        sections.append(Section("best", "Best recipe", words, text=recipe_text(result.best_config)))
    page = Page(f"Sweep of {result.run_dir}", _subtitle(section, measure), _facts(result, saved), sections)
    return render(page)


def _subtitle(section: TuneConfig, measure: SweepObjective) -> str:
    goals = ", ".join(f"{objective.metric} ({objective.mode})" for objective in measure.objectives)
    bounds = "; ".join(f"{name} within {_bounds(bound)}" for name, bound in measure.constraints.items())
    return f"Search {section.search}, scheduler {section.scheduler}, by {goals}" + (f"; {bounds}" if bounds else "") + "."


def _bounds(bounds: Any) -> str:
    low = "-inf" if bounds.min is None else f"{bounds.min:g}"
    high = "inf" if bounds.max is None else f"{bounds.max:g}"
    return f"[{low}, {high}]"


def _facts(result: SweepResult, saved: SweepSavings) -> list[Fact]:
    counts = {status: sum(record.status == status for record in result.records) for status in ("finished", "stopped", "failed")}
    facts = [
        Fact("trials", str(len(result.records))),
        Fact("finished, ended early, failed", f"{counts['finished']}, {counts['stopped']}, {counts['failed']}"),
        Fact("tokens trained", f"{saved.tokens:,}"),
        Fact("steps that weren't needed", f"{saved.steps_left:,} of {saved.steps:,}"),
    ]
    if saved.speed:
        facts.insert(3, Fact("tokens/s of all trials", f"{saved.speed:,.0f}"))
    if result.best is not None:
        first = result.measure.first.metric
        finals = result.finals
        value = _number(result.best.metrics[first]) if finals is None else finals.chosen.shown(first)
        word = "best" if finals is None or not finals.equal else f"{finals.word} of equal"
        facts.insert(0, Fact(f"{word} {metric_label(first)} (trial {result.best.name})", value))
    return facts


def _finalists(finals: Finals) -> Section:
    """Show each finalist's runs with other seeds, their mean and spread, and which is taken."""
    metric = finals.objective.metric
    figure = go.Figure()
    for index, finalist in enumerate(finals.finalists):
        figure.add_scatter(
            x=[f"trial {finalist.record.name}"] * len(finalist.runs),
            y=finalist.values(metric),
            hovertext=[f"seed {seed}" for seed in finalist.seeds],
            mode="markers",
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 10},
            name=f"trial {finalist.record.name}",
        )
    figure.update_yaxes(title=metric_label(metric))
    names = ("trial", "seeds", f"{metric_label(metric)}, mean ± deviation", finals.cost_column, "verdict")
    rows = [Row([one.record.name, *finalist_cells(finals, one)], is_best=one == finals.chosen) for one in finals.finalists]
    table = Table([Column(name, is_text=name != finals.cost_column) for name in names], rows)
    words = f"{finals.sentence()} Each point is a run with another seed, on the same evaluation rows. A finalist is better "
    words += "than another if equal ones would come out like this in at most 5 % (exact Mann-Whitney test). The run by "
    words += "which the search chose it doesn't count."
    return Section("finalists", "Finalists", words, [chart(figure, f"{metric_label(metric)} by seed")], table=table)


def _over_time(folder: SweepFolder, records: Sequence[TrialRecord], measure: SweepObjective, best: set[int]) -> Section:
    histories = {record.number: _history(folder, record) for record in records}
    goals = [objective.metric for objective in measure.objectives]
    names = dict.fromkeys(name for rows in histories.values() for row in rows for name in row)
    # Shown without being asked for: a better score may come from drift, or from longer answers.
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
    for index, record in enumerate(records):
        rows = [row for row in histories[record.number] if row.get(metric) is not None]
        if not rows:
            continue
        figure.add_scatter(
            x=[row["step"] for row in rows],
            y=[row[metric] for row in rows],
            name=f"trial {record.name}",
            mode="lines+markers",
            line={"dash": DASHES[index % len(DASHES)], "width": BEST_WIDTH if record.number in best else OTHER_WIDTH},
            marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 7},
            hovertext=shown_values(record.values),
        )
    figure.update_xaxes(title="step")
    return chart(figure, metric_label(metric), height=420)


def _values(section: TuneConfig, records: Sequence[TrialRecord], measure: SweepObjective) -> Section:
    charts = []
    # Trial 0 with the recipe's own values has no point in the space.
    searched = [record for record in records if record.values is not None]
    if len(searched) >= 2:
        figure = parallel_coordinates(section, searched, measure)
        charts.append(chart(figure, "Parallel coordinates", wide=True, height=420, top=100))
    words = "Each line of the parallel coordinates is a trial; drag along an axis to select."
    importance = importances(section, searched, measure.first)
    if importance:
        charts.append(_bars(importance, measure.first))
        words += " Importance: how much of the metric's variance a key explains among the better trials (PED-ANOVA, arXiv "
        words += "2304.10255); with few trials it is a hint, not a proof."
    else:
        words += " There are too few trials, or too little difference between them, to say which key matters."
    return Section("values", "Values and what they do", words, charts)


def _bars(importance: dict[str, float], objective: Objective) -> Chart:
    names = sorted(importance, key=lambda name: importance[name])
    shares = [importance[name] for name in names]
    figure = go.Figure(go.Bar(x=shares, y=names, orientation="h", text=[f"{share:.0%}" for share in shares]))
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(automargin=True)
    return chart(figure, f"Importance for {metric_label(objective.metric)}", wide=True, height=140 + 36 * len(names))


def _compared(records: Sequence[TrialRecord], measure: SweepObjective, best: set[int]) -> Section:
    """Plot two metrics against each other: several objectives with their Pareto front, or the metric against eval_kl."""
    objectives = list(measure.objectives)
    front = len(objectives) > 1
    others = objectives[1:] if front else [Objective(name, "min") for name in ("eval_kl",) if name in measure.reported]
    charts = [_scatter(records, measure.first, other, best, front) for other in others]
    words = "Trials on the line are the Pareto front: none is better in one metric without being worse in another."
    if not front:
        words = "What a trial's score has cost in distance from the reference."
    return Section("front", "Pareto front" if front else "Score and drift", words, charts)


def _scatter(records: Sequence[TrialRecord], objective: Objective, other: Objective, best: set[int], front: bool) -> Chart:
    compared = [record for record in records if objective.metric in record.metrics and other.metric in record.metrics]
    figure = go.Figure()
    for name, symbol, chosen in (
        ("on the front" if front else "best", "star", [record for record in compared if record.number in best]),
        ("others", "circle", [record for record in compared if record.number not in best]),
    ):
        # Sorted, since the front is drawn as a line.
        chosen = sorted(chosen, key=lambda record: record.metrics[other.metric])
        figure.add_scatter(
            x=[record.metrics[other.metric] for record in chosen],
            y=[record.metrics[objective.metric] for record in chosen],
            text=[str(record.number) for record in chosen],
            hovertext=[shown_values(record.values) for record in chosen],
            textposition="top center",
            mode="lines+markers+text" if front and symbol == "star" else "markers+text",
            marker={"symbol": symbol, "size": 12 if symbol == "star" else 9},
            name=name,
        )
    figure.update_xaxes(title=metric_label(other.metric))
    figure.update_yaxes(title=metric_label(objective.metric))
    return chart(figure, f"{metric_label(objective.metric)} against {metric_label(other.metric)}", height=420)


def _cost(records: Sequence[TrialRecord], saved: SweepSavings) -> Section:
    names = [f"trial {record.name}" for record in records]
    charts = []
    for title, values, left in (
        ("Steps", [record.step for record in records], [max(record.total_steps - record.step, 0) for record in records]),
        ("Seconds", [round(record.seconds, 1) for record in records], None),
    ):
        figure = go.Figure(go.Bar(x=names, y=values, name="trained" if left else "spent"))
        if left is not None and any(left):
            figure.add_bar(x=names, y=left, name="not needed", marker={"pattern": {"shape": "/"}, "opacity": 0.45})
        # Steps that weren't needed stand on those that were trained: together the planned number.
        figure.update_layout(barmode="stack")
        charts.append(chart(figure, title))
    return Section("cost", "Cost, and what sharing has saved", " ".join(saved.sentences()), charts)


def _trials(section: TuneConfig, records: Sequence[TrialRecord], measure: SweepObjective, best: set[int]) -> Section:
    keys = keys_of(section.space, records)
    names = [*(objective.metric for objective in measure.objectives), *measure.constraints]
    hosts = any(record.stays for record in records)
    columns = [Column("trial", is_text=True), Column("status", is_text=True), *(Column(key) for key in keys), Column("step")]
    columns += [Column(metric_label(name)) for name in names] + [
        *([Column("host")] if hosts else []),
        Column("tokens"),
        Column("tokens/s"),
        Column("time"),
        Column("notes", is_text=True),
    ]
    rows = []
    for record in records:
        values = ["recipe" if record.values is None else shown_value(record.values.get(key, "")) for key in keys]
        metrics = [_number(record.metrics[name]) if name in record.metrics else "" for name in names]
        outside = [] if measure.allows(record.metrics) or not record.metrics else ["outside the constraints"]
        own = [f"workers of its own: {record.stays[-1].why}"] if record.shown_host == "own" else []
        notes = [relation(record), *own, *(f"went on from {origin}" for origin in record.origins), record.reason, *outside]
        speed = f"{record.speed:,.0f}" if record.speed else ""
        cost = [
            *([record.shown_host] if hosts else []),
            f"{record.tokens:,}",
            speed,
            str(timedelta(seconds=round(record.seconds))),
        ]
        status = WORDS.get(record.status, record.status)
        steps = f"{record.step}/{record.total_steps}"
        rows.append(
            Row([record.name, status, *values, steps, *metrics, *cost, "; ".join(filter(None, notes))], record.number in best)
        )
    return Section("trials", "Trials", table=Table(columns, rows))


def _number(value: float) -> str:
    return f"{value:.4g}"
