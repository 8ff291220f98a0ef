"""Kinds of rows by method: a pair, one labelled completion, or a prompt alone; and file formats of raw rows."""

from __future__ import annotations

from typing import Literal

from pipeline.errors import UserError
from strategies.methods.registry import STRATEGIES
from strategies.types import BatchKind

__all__ = ["COMPLETIONS", "ROW_COLUMNS", "SourceFormat", "kind_of", "methods", "raw_kind"]

SourceFormat = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow"]
COMPLETIONS: dict[BatchKind, tuple[str, ...]] = {"pair": ("chosen", "rejected"), "unpaired": ("completion",), "prompt": ()}
"""Kind of row -> names of the texts that follow its prompt."""
ROW_COLUMNS = {"prompt", "chosen", "completion", "messages", "conversations", "instruction", "question", "input"}
"""Columns that distinguish a row from a message, and from an object that holds rows."""


def kind_of(rl: str) -> BatchKind:
    """Return the kind of a prepared row for an `rl:` value.

    Raises:
        UserError: for an unknown value.
    """
    if rl not in STRATEGIES:
        raise UserError(f"rl: unknown value {rl!r}; available: {', '.join(STRATEGIES)}")
    return STRATEGIES[rl].batch_kind


def raw_kind(rl: str, split_pairs: bool) -> BatchKind:
    """Return the kind of a raw row: a pair where `split_pairs` makes two labelled completions of each.

    Raises:
        UserError: as `kind_of`; and for `split_pairs` with a method that doesn't take labelled completions.
    """
    kind = kind_of(rl)
    if not split_pairs:
        return kind
    if kind != "unpaired":
        raise UserError(f"split_pairs: has no effect with rl: {rl}; it makes labelled answers, for rl: {methods('unpaired')}")
    return "pair"


def methods(kind: BatchKind) -> str:
    """Return the `rl:` values that take rows of a kind, as text."""
    return ", ".join(rl for rl, strategy in STRATEGIES.items() if strategy.batch_kind == kind)
