"""Rules between `select:` and the rest of a recipe."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.recipe import RunConfig
from pipeline.config.selection import NEEDS, ROW_COLUMNS, Need, available_columns
from strategies.methods.registry import STRATEGIES

__all__ = ["find_problems"]


def find_problems(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a (path, message) for every problem of the section, given the whole recipe."""
    if cfg.select is None or cfg.rl not in STRATEGIES:
        return
    strategy, by = STRATEGIES[cfg.rl], cfg.select.by
    if strategy.batch_kind == "prompt":
        yield "select", f"rows of rl: {cfg.rl} have a prompt alone, and no column to select by; remove it"
        return
    computed: list[Need] = []
    if strategy.reference_mode(cfg) == "cached":
        computed = ["scores", "hidden"] if cfg.ray.score.hidden_states else ["scores"]
    names = available_columns(strategy.batch_kind, computed)
    if by not in names:
        column = ROW_COLUMNS.get(by)
        why = "is no column"
        if column is not None:
            lacks = column.need is not None and strategy.batch_kind in column.kinds
            why = f"needs {NEEDS[column.need]}" if lacks and column.need else f"is no column of rows of rl: {cfg.rl}"
        yield "select.by", f"{by} {why}; there are: {', '.join(names)}"
