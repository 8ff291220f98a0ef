"""The training rows that `select:` keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import RunConfig
from pipeline.config.selection import ROW_COLUMNS, SelectConfig
from pipeline.data.fingerprint import digest
from pipeline.data.store import TRAIN, Prepared
from pipeline.errors import UserError
from pipeline.inspection.columns import RowColumns, content_columns, measure_columns

if TYPE_CHECKING:
    from pipeline.reference import Scores

__all__ = ["Selection", "kept_rows", "select_rows", "selected_count"]


@dataclass(frozen=True)
class Selection:
    """Rows that a run trains on: a handle, from which each process reads the column and finds the same rows."""

    select: SelectConfig
    columns: RowColumns
    rows: int
    """Number of rows that are kept."""

    @property
    def fingerprint(self) -> str:
        """Id of these rows."""
        return digest({"columns": self.columns.fingerprint, **self.select.model_dump()})

    def indices(self) -> NDArray[np.int64]:
        """Return the kept training rows, ascending, shape (rows,)."""
        values = self.columns.read(TRAIN, [self.select.by])[self.select.by].to_numpy()
        return kept_rows(values, self.select)


def selected_count(cfg: RunConfig, rows: int) -> int:
    """Return the number of `rows` training rows that the recipe keeps.

    Raises:
        UserError: when it keeps none.
    """
    if cfg.select is None:
        return rows
    count = cfg.select.count(rows)
    if not count:
        least = 1 / rows if rows else 1.0
        raise UserError(
            f"select.keep: {cfg.select.keep:g} of {rows} training rows leaves none to train on; give {least:.3g} or more"
        )
    return count


def select_rows(cfg: RunConfig, prepared: Prepared, scores: Scores | None) -> Selection | None:
    """Return the selection of the recipe; None for all rows. Runs no forward: what is missing is computed from the scores.

    Raises:
        UserError: when nothing is left, or the columns can't be written.
    """
    if cfg.select is None:
        return None
    count = selected_count(cfg, prepared.train_rows)
    if ROW_COLUMNS[cfg.select.by].group == "contents":
        columns = content_columns(cfg, prepared)
    else:
        columns = measure_columns(cfg, prepared, scores)
    return Selection(cfg.select, columns, count)


def kept_rows(values: NDArray[Any], select: SelectConfig) -> NDArray[np.int64]:
    """Return the indices of the rows that are kept, ascending; of equal values the first rows count as the lowest."""
    order, count = np.argsort(values, kind="stable"), select.count(len(values))
    starts = {"bottom": 0, "middle": (len(values) - count) // 2, "top": len(values) - count}
    start = starts[select.side]
    return np.sort(order[start : start + count])
