"""Entry point of `prefray inspect`: prepared data and their scores in, findings and columns out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.config.paths import absolute_paths
from pipeline.data import prepare
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import EVAL, TRAIN, Prepared
from pipeline.errors import UserError
from pipeline.inspection.columns import RowColumns, content_columns, measure_columns
from pipeline.inspection.overlap import overlap_columns, read_benchmark
from pipeline.inspection.result import FINDINGS, Inspection
from pipeline.inspection.rules import find_all
from pipeline.ray.tasks import Executor, write_error
from pipeline.reference.scoring import find_scores
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.reference import Scores

__all__ = ["inspect"]

Progress = Callable[[dict[str, Any]], None]


def inspect(
    cfg: RunConfig,
    against: Sequence[str] = (),
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Inspection:
    """Look for what is odd in the prepared data of a recipe; prepares them unless they are cached, and scores nothing.

    The columns of every row are kept beside the scores, and opened instead of computed from then on.

    Args:
        cfg: the recipe.
        against: files of benchmarks, whose 8-grams are looked for in the rows.
        progress: as of `prepare`.
        executor: runs the tasks; Ray Data for many rows and this process for few when None.

    Raises:
        UserError: for rows of prompts alone, a benchmark that can't be read, or an unwritable folder; as `prepare`.
    """
    if get_strategy(cfg.rl).batch_kind == "prompt":
        raise UserError(
            f"rl: {cfg.rl}: its rows are prompts alone, and `inspect` compares answers; give a recipe of another method"
        )
    cfg = absolute_paths(cfg)
    # Before the data, which may take long.
    benchmarks = [read_benchmark(path) for path in against]
    prepared = prepare(cfg, progress=progress, executor=executor)
    scores, missing = _scores(cfg, prepared)
    columns = [measure_columns(cfg, prepared, scores, executor), content_columns(cfg, prepared, executor)]
    if benchmarks:
        columns.append(overlap_columns(cfg, prepared, benchmarks, executor))
    else:
        missing.append("overlap with benchmarks: give their files with --against")
    table = _table(prepared, columns)
    found = Inspection(prepared, scores, find_all(table), tuple(missing), tuple(columns), table)
    try:
        columns[0].folder.write_json(FINDINGS, found.as_json())
    except OSError as error:
        raise UserError(write_error(error, str(columns[0].path))) from error
    return found


def _scores(cfg: RunConfig, prepared: Prepared) -> tuple[Scores | None, list[str]]:
    """Return the cached scores, and what can't be looked at without them."""
    what = "label flips and what the reference ranks right"
    mode = get_strategy(cfg.rl).reference_mode(cfg)
    if mode != "cached":
        why = "keeps its reference in memory" if mode == "live" else "has no reference"
        return None, [f"{what}: rl: {cfg.rl} {why} here; there are scores with rl: dpo or ipo and reference: cached"]
    scores = find_scores(cfg, prepared)
    if scores is None:
        return None, [f"{what}: the reference's scores aren't there; `prefray score RECIPE` computes them"]
    if not scores.has_hidden_states:
        return scores, ["hard pairs (ches): score with ray.score.hidden_states: true"]
    return scores, []


def _table(prepared: Prepared, columns: Sequence[RowColumns]) -> pd.DataFrame:
    """Join the columns of all rows, and add those that follow from them."""
    import pandas as pd

    parts = []
    for split in (TRAIN, EVAL):
        rows = prepared.rows(split)
        tables = [one.read(split).to_pandas() for one in columns] if rows else []
        joined = pd.concat([tables[0], *(table.drop(columns="row_id") for table in tables[1:])], axis=1) if tables else None
        if joined is not None:
            parts.append(joined.assign(split=split))
    table = pd.concat(parts, ignore_index=True)
    table["duplicate_of"] = table["duplicate_of"].fillna(-1).astype(np.int64)
    table["tokens"] = table[["prompt_length", *(f"{name}_length" for name in COMPLETIONS[prepared.manifest["kind"]])]].sum(
        axis=1
    )
    return table[["split", *(name for name in table.columns if name != "split")]]
