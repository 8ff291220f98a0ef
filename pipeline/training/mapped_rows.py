"""The rows of a run, mapped from files of the node's cache, with the reference's scores beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset
from datasets.table import ConcatenationTable, MemoryMappedTable

from pipeline.data.mapped import StoredColumns, map_columns
from pipeline.data.node_pictures import pictures_on_node
from pipeline.data.pictures import IMAGES
from pipeline.data.store import TRAIN
from pipeline.io.cache import NodeCache
from pipeline.reference.score_files import LOGPS
from pipeline.training.heartbeat import beat

if TYPE_CHECKING:
    from pipeline.data import Prepared
    from pipeline.reference import Scores

__all__ = ["map_rows"]


def map_rows(cache: NodeCache, prepared: Prepared, scores: Scores | None, split: str, columns: Sequence[str]) -> Dataset:
    """Return the rows of a split, in the order of the store: its columns, and those of the scores.

    Raises:
        UserError: as `map_columns`.
    """
    kind = "training" if split == TRAIN else "evaluation"
    pictures = pictures_on_node(cache, prepared, beat) if IMAGES in columns else None
    parts = [StoredColumns.of(prepared, split, columns, f"the {kind} rows", pictures)]
    if scores is not None:
        parts.append(StoredColumns.of(scores, split, LOGPS, f"the reference's log-probabilities of the {kind} rows"))
    # As files: a data-loader process that isn't forked maps them too, where it would get a copy of a table.
    tables = [MemoryMappedTable.from_file(str(map_columns(cache, part, beat))) for part in parts]
    # With a fingerprint: to compute one, `datasets` would read the rows.
    return Dataset(ConcatenationTable.from_tables(tables, axis=1), fingerprint="-".join(part.key for part in parts))
