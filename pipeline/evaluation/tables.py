"""Evaluations and answers on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pipeline.display import Display
    from pipeline.evaluation.answering import SamplingOptions
    from pipeline.evaluation.generate import Answers
    from pipeline.evaluation.result import Evaluation
    from pipeline.evaluation.statistics import Estimate

__all__ = ["print_answers", "print_evaluation", "talk"]

WIDTH = 140
"""Of tables that don't go to a terminal."""
BREAKDOWN = ("rewards/accuracies", "rewards/margins", "average_logps/accuracies", "answers/length", "answers/kl")
"""Columns of the table by source; win rates come beside them."""


def _console(console: Console | None) -> Console:
    console = console or Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH), file=console.file)


def print_evaluation(found: Evaluation, console: Console | None = None) -> None:
    """Print all metrics with their intervals, and by source what matters most."""
    console = _console(console)
    against = f" against {found.reference}" if found.reference else ""
    console.print(f"{found.policy}{against}", soft_wrap=True, highlight=False, markup=False)
    table = Table()
    table.add_column("metric", no_wrap=True)
    for name in ("mean", f"{found.confidence:.0%} interval", "rows"):
        table.add_column(name, justify="right")
    for name, one in found.metrics.items():
        table.add_row(name, _number(one.value), f"{_number(one.low)} to {_number(one.high)}", str(one.n))
    console.print(table)
    if found.by_source:
        _print_sources(found, console)
    for note in found.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _print_sources(found: Evaluation, console: Console) -> None:
    wins = [name for name in found.metrics if name.startswith("answers/win_rate/")]
    names = [name for name in (*BREAKDOWN, *wins) if name in found.metrics]
    table = Table(title="by source")
    table.add_column("source", overflow="fold")
    for name in names:
        table.add_column(name, justify="right")
    for source, metrics in found.by_source.items():
        table.add_row(Text(source), *(_short(metrics.get(name)) for name in names))
    console.print(table)


def _short(one: Estimate | None) -> str:
    return "" if one is None else f"{_number(one.value)} ({one.n})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def print_answers(found: Answers, console: Console | None = None) -> None:
    """Print prompts and answers side by side."""
    console = _console(console)
    table = _side_by_side(found.reference is not None)
    for row in found.rows:
        _add(table, row)
    console.print(table)


def _side_by_side(has_reference: bool) -> Table:
    table = Table(show_lines=True)
    for name in ("prompt", "policy", *(["reference"] if has_reference else [])):
        table.add_column(name, overflow="fold", ratio=1)
    return table


def _add(table: Table, row: dict[str, Any]) -> None:
    table.add_row(*(Text(row[name]) for name in ("prompt", "policy", "reference") if name in row))


def talk(
    run: str,
    reference: str | None,
    options: SamplingOptions,
    raw: bool,
    overrides: Iterable[str],
    display: Display,
) -> None:
    """Ask for prompts until an empty one or the end of the input, and answer each."""
    from pipeline.evaluation.answering import check_sampling
    from pipeline.evaluation.generate import Speakers
    from pipeline.evaluation.subject import find_subject

    check_sampling(options)
    subject = find_subject(run, reference, overrides)
    display.stage("loading models")
    speakers = Speakers(subject)
    display.close()
    console = Console()
    console.print("An empty prompt ends it.")
    while prompt := _asked(console):
        table = _side_by_side(subject.reference is not None)
        for row in speakers.answer([prompt], options, raw):
            _add(table, row)
        console.print(table)


def _asked(console: Console) -> str:
    try:
        return console.input("prompt> ").strip()
    except EOFError:
        return ""
