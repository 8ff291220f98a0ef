"""The tokens that a merged model is verified on."""

from __future__ import annotations

from typing import Any

from pipeline.data.store import EVAL, TRAIN, Prepared

__all__ = ["samples"]

ROWS, TOKENS = 4, 128
"""Sequences, and tokens of each at most."""
COMPLETIONS = {"pair": ["chosen_ids"], "unpaired": ["completion_ids"], "prompt": []}
"""What follows a prompt, by the kind of the prepared rows."""
SENTENCES = (
    "Question: how many legs does a spider have? Answer: a spider has eight legs, two more than an insect.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Dear Ms. Ivanova,\n\nthank you for your letter of 3 May. The invoice (EUR 1,249.50) was paid on Friday.\n",
    "Die Brücke wurde 1932 gebaut; seitdem fahren täglich rund 4.000 Züge über den Fluss.",
)


def samples(prepared: Prepared | None, tokenizer: Any, special: list[int]) -> tuple[list[list[int]], str]:
    """Sequences of token ids, and in words where they are from.

    Args:
        prepared: a run's data, of which evaluation rows are taken, or training rows where there are none; None takes
            built-in sentences.
        special: tokens whose embeddings the adapter has changed by themselves, which otherwise might not occur.
    """
    found, origin = _rows(prepared) if prepared is not None else ([], "")
    if not found:
        found, origin = [tokenizer(text)["input_ids"][:TOKENS] for text in SENTENCES], "built-in sentences"
    return [*(ids for ids in found if ids), *([special[:TOKENS]] if special else [])], origin


def _rows(prepared: Prepared) -> tuple[list[list[int]], str]:
    split, name = (EVAL, "evaluation") if prepared.eval_rows else (TRAIN, "training")
    columns = ["prompt_ids", *COMPLETIONS[prepared.manifest["kind"]]]
    table = prepared.read(split, columns).slice(0, ROWS)
    rows = [[token for column in columns for token in row[column]][:TOKENS] for row in table.to_pylist()]
    return rows, f"{name} rows of the run"
