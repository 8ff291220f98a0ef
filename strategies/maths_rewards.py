"""Rewards of maths problems with a number for an answer; pure functions, for `trl.reward_funcs`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

__all__ = ["final_number"]

MARKED = re.compile(r"####\s*\$?\s*(-?(?:\d[\d,]*)?(?:\.?\d+)?)")


def final_number(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """1 where a completion ends with the right number, else 0: the one after its last `####`, as GSM8K writes its answers.

    `1,200`, `$1200` and `1200.00` are the same number. A completion without `####` has no answer.

    Args:
        completions: text, or messages of which the last one counts; one entry per completion.
        answer: the row's column of that name, with the right number after its last `####` (GSM8K, arXiv 2110.14168).

    Returns:
        One reward per completion; None, which leaves the completion out, where `answer` has no number.
    """
    rewards: list[float | None] = []
    for completion, solution in zip(completions, answer, strict=True):
        right = _marked_number(solution)
        rewards.append(None if right is None else float(_marked_number(_text(completion)) == right))
    return rewards


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _marked_number(text: str) -> Decimal | None:
    """The number after the last mark."""
    found = [number for number in MARKED.findall(text) if any(character.isdigit() for character in number)]
    return Decimal(found[-1].replace(",", "")) if found else None
