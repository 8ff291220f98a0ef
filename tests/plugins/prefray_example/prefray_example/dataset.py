"""`type: ranked`: of several answers with scores, the best against the worst."""

from __future__ import annotations

from collections.abc import Callable

from pipeline import register_dataset_type
from pipeline.data.transforms import Context, Rendered, Row, RowError, list_field, pair_text, text_field


@register_dataset_type("ranked", keys=["field_prompt"])
def ranked(context: Context) -> Callable[[Row], Rendered]:
    column = context.keys.get("field_prompt", "question")

    def render(row: Row) -> Rendered:
        answers = sorted(list_field(row, "answers"), key=lambda answer: answer["score"])
        worst, best = answers[0], answers[-1]
        if worst["score"] == best["score"]:
            raise RowError("all answers have the same score")
        return pair_text(text_field(row, column) + "\n", best["text"], worst["text"])

    return render
