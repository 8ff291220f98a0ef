"""Rewards of maths problems with numeric answers; pure functions, for `trl.reward_funcs`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

__all__ = ["final_number"]

# An integer with separators, a decimal part (`.5`), or both, without the full stop of a sentence; it may match nothing.
MARKED = re.compile(r"####\s*\$?\s*(-?(?:\d[\d,]*)?(?:\.?\d+)?)")


def final_number(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """Return 1 for a completion with the right number after its last `####` (the format of GSM8K), else 0.

    `1,200`, `$1200` and `1200.00` are the same number. A completion without `####` has no answer.

    Args:
        completions: text, or messages of which the last one is used; one entry per completion.
        answer: the rows' column of that name, with the right number after the last `####` (GSM8K, arXiv 2110.14168).

    Returns:
        One reward per completion; None, which excludes the completion, if `answer` has no number.
    """
    rewards: list[float | None] = []
    for completion, solution in zip(completions, answer, strict=True):
        right = _marked_number(solution)
        rewards.append(None if right is None else float(_marked_number(_text(completion)) == right))
    return rewards


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _marked_number(text: str) -> Decimal | None:
    """Return the number after the last mark, or None."""
    # Headings of Markdown have the mark too, without a number.
    numbers = [number for number in MARKED.findall(text) if any(character.isdigit() for character in number)]
    # Decimal, for which 1200 and 1200.00 are equal without rounding.
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
