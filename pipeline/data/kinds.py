"""What a row holds, by method: two answers, one labelled answer, or a prompt alone."""

from __future__ import annotations

from pipeline.errors import UserError
from strategies.base import BatchKind
from strategies.registry import STRATEGIES

__all__ = ["COMPLETIONS", "ROW_COLUMNS", "kind_of", "methods", "raw_kind"]

COMPLETIONS: dict[BatchKind, tuple[str, ...]] = {"pair": ("chosen", "rejected"), "unpaired": ("completion",), "prompt": ()}
"""Kind of row -> names of the texts that follow its prompt."""
ROW_COLUMNS = {"prompt", "chosen", "completion", "messages", "conversations", "instruction", "question", "input"}
"""One of these tells a row from a message, and from an object that holds rows."""


def kind_of(rl: str) -> BatchKind:
    """What one prepared row holds for an `rl:` value.

    Raises:
        UserError: for a value that no strategy has.
    """
    if rl not in STRATEGIES:
        raise UserError(f"rl: unknown value {rl!r}; available: {', '.join(STRATEGIES)}")
    return STRATEGIES[rl].batch_kind


def raw_kind(rl: str, split_pairs: bool) -> BatchKind:
    """What one raw row holds, which is a pair where `split_pairs` makes two labelled answers of each.

    Raises:
        UserError: as `kind_of`; and for `split_pairs` with a method that learns from something else.
    """
    kind = kind_of(rl)
    if not split_pairs:
        return kind
    if kind != "unpaired":
        raise UserError(f"split_pairs: has no effect with rl: {rl}; it makes labelled answers, for rl: {methods('unpaired')}")
    return "pair"


def methods(kind: BatchKind) -> str:
    """The `rl:` values that take rows of a kind, as text."""
    return ", ".join(rl for rl, strategy in STRATEGIES.items() if strategy.batch_kind == kind)
