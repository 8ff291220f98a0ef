"""Whether every pair fits the tokens of one forward, said before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import UserError
from strategies.batching import packed_tokens

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["check_budget", "check_training_budget", "part_tokens", "scoring_budget"]

LENGTHS = ["prompt_length", "chosen_length", "rejected_length"]


def scoring_budget(cfg: Any) -> tuple[int, str]:
    """Most tokens of one scoring forward, and the key that says it."""
    if cfg.ray.score.tokens_per_forward is not None:
        return cfg.ray.score.tokens_per_forward, "ray.score.tokens_per_forward"
    return cfg.tokens_per_forward or 2 * cfg.sequence_len, "tokens_per_forward"


def check_training_budget(cfg: Any, prepared: Prepared) -> None:
    """`check_budget` for the rows that training packs; nothing to check where it doesn't.

    Raises:
        UserError: as `check_budget`.
    """
    if prepared.manifest["kind"] == "pair" and cfg.sample_packing:
        check_budget(prepared, cfg.tokens_per_forward or 2 * cfg.sequence_len, "tokens_per_forward")


def check_budget(prepared: Prepared, budget: int, key: str) -> None:
    """Check that no prepared pair takes more than `budget` tokens, its prompt standing once for both completions.

    Args:
        key: the config key that says the budget.

    Raises:
        UserError: naming the longest row, its tokens, and so the smallest budget that fits.
    """
    files = [*prepared.train_files(), *prepared.eval_files()]
    too_long, longest = 0, (0, 0, Path())
    for file in files:
        tokens = part_tokens(file)
        too_long += int((tokens > budget).sum())
        if len(tokens) and tokens.max() > longest[0]:
            longest = (int(tokens.max()), int(tokens.argmax()), file)
    if not too_long:
        return
    most, place, file = longest
    source, number = _origin(file, place)
    others = f"; {too_long - 1} other row{'s are' if too_long > 2 else ' is'} too long as well" if too_long > 1 else ""
    raise UserError(
        f"{key}: {budget} tokens don't hold row {number} of {source}, which takes {most} (its prompt once, and both "
        f"completions){others}; the smallest budget that fits every row is {most}: set {key}: {most}, or a shorter sequence_len"
    )


def part_tokens(file: Path) -> NDArray[np.int64]:
    """Tokens that each pair of a prepared part takes in a packed row, shape (rows,)."""
    table = pq.read_table(file, columns=LENGTHS, partitioning=None)
    return packed_tokens(np.stack([table[name].to_numpy() for name in LENGTHS], axis=1).astype(np.int64))


def _origin(file: Path, place: int) -> tuple[str, int]:
    row = pq.read_table(file, columns=["source", "row_number"], partitioning=None).slice(place, 1).to_pylist()[0]
    return row["source"], row["row_number"]
