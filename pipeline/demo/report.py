"""The comparison that the demo prints at its end."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from pipeline.demo.preferences import OPENING, follows_preference
from pipeline.evaluation.generate import Answers
from pipeline.ui.console import Printable, table_of

__all__ = ["Comparison"]


@dataclass(frozen=True)
class Comparison(Printable):
    """Answers before and after training, and the fraction that follows the preference."""

    answers: Answers
    shown: int
    """Prompts whose answers are shown."""
    seconds: float
    """Duration of the demo."""

    @property
    def improved(self) -> bool:
        """Whether more answers follow the preference after training."""
        return self._fraction("policy") > self._fraction("reference")

    def __rich__(self) -> Group:
        columns = ("prompt", "before", "after")
        rows = [(row["prompt"], _marked(row["reference"]), _marked(row["policy"])) for row in self.answers.rows[: self.shown]]
        fractions = f"{self._fraction('reference'):.0%} before, {self._fraction('policy'):.0%} after"
        verdict = "It worked." if self.improved else "It did NOT improve: the training has not reached its goal."
        return Group(
            table_of(columns, rows, title="held-out prompts, greedy answers", left=columns, show_lines=True),
            Text(f"opens with {OPENING!r}: {fractions}, of {len(self.answers.rows)} held-out prompts"),
            Text(f"{verdict} ({self.seconds:.0f} s)"),
        )

    def _fraction(self, who: str) -> float:
        return sum(follows_preference(row[who]) for row in self.answers.rows) / len(self.answers.rows)


def _marked(answer: str) -> str:
    text = " ".join(answer.split())
    return f"{'✓' if follows_preference(answer) else '✗'} {text if len(text) <= 160 else text[:157] + '...'}"
