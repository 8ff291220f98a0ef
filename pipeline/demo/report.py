"""What the demonstration ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.demo.preferences import OPENING, follows_preference
from pipeline.evaluation.generate import Answers

__all__ = ["print_comparison"]


def print_comparison(answers: Answers, shown: int, seconds: float, console: Console | None = None) -> bool:
    """Print answers before and after and the fraction that follows the preference; returns whether it grew."""
    console = console or Console()
    table = Table(title="held-out prompts, greedy answers", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in answers.rows[:shown]:
        table.add_row(row["prompt"], _marked(row["reference"]), _marked(row["policy"]))
    console.print(table, markup=False)
    before, after = (_fraction([row[who] for row in answers.rows]) for who in ("reference", "policy"))
    console.print(f"opens with {OPENING!r}: {before:.0%} before, {after:.0%} after, of {len(answers.rows)} held-out prompts")
    improved = after > before
    verdict = "It worked." if improved else "It did NOT improve: the training has not reached its goal."
    console.print(f"{verdict} ({seconds:.0f} s)")
    return improved


def _fraction(texts: list[str]) -> float:
    """Part of the answers that follow the preference."""
    return sum(map(follows_preference, texts)) / len(texts)


def _marked(answer: str) -> str:
    text = " ".join(answer.split())
    return f"{'✓' if follows_preference(answer) else '✗'} {text if len(text) <= 160 else text[:157] + '...'}"
