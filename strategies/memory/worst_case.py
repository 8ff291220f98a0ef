"""The largest forward that a config allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strategies.methods.registry import get_strategy

__all__ = ["Forward", "largest_forward", "longest_pair", "worst_lengths"]


@dataclass(frozen=True)
class Forward:
    """The largest forward of a run."""

    packed: bool
    tokens: int
    """That the model computes, padding among them."""
    pairs: int
    """Pairs, or labelled rows, in it."""
    padded_because: str | None = None
    """Why batches are padded although packed rows were asked for."""


def longest_pair(cfg: Any) -> int:
    """Return the most tokens of one pair in a packed row: two sequences that share a prompt of one token."""
    return 2 * (cfg.sequence_len - 1)


def worst_lengths(cfg: Any, packed: bool) -> list[tuple[int, int, int]]:
    """Return the tokens of prompt, chosen and rejected of the pairs that a full forward holds.

    Prompts of one token: then all others are scored, and the attention of each completion is as wide as it gets.
    """
    whole = (1, cfg.sequence_len - 1, cfg.sequence_len - 1)
    if not packed:
        return cfg.micro_batch_size * [whole]
    # The default is two tokens more than the longest pair takes; they become a second, short pair.
    number, rest = divmod(cfg.tokens_per_forward or 2 * cfg.sequence_len, max(1, longest_pair(cfg)))
    return [*(number * [whole]), *([(1, rest - rest // 2, rest // 2)] if rest >= 2 else [])]


def largest_forward(cfg: Any, padded_because: str | None) -> Forward:
    """Return the worst case that the config allows.

    Args:
        cfg: a validated config.
        padded_because: why the models can't take packed rows; None where they can.
    """
    pairs = get_strategy(cfg.rl).batch_kind == "pair"
    asked = pairs and cfg.sample_packing
    if asked and padded_because is None:
        lengths = worst_lengths(cfg, packed=True)
        # The prompt's one token starts both completions, whose last tokens aren't fed: one token less per pair.
        return Forward(True, sum(map(sum, lengths)) - len(lengths), len(lengths))
    tokens = (1 + pairs) * cfg.micro_batch_size * cfg.sequence_len
    return Forward(False, tokens, cfg.micro_batch_size, padded_because if asked else None)
