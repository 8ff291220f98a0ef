"""The rows of a run, mapped from files of the node's cache, with the reference's scores beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from datasets import Dataset
from datasets.table import ConcatenationTable, MemoryMappedTable

from pipeline.data.mapped import StoredColumns, map_columns, mapped_item
from pipeline.data.node_pictures import pictures_item, pictures_on_node
from pipeline.data.pictures import IMAGES
from pipeline.data.store import EVAL, TRAIN
from pipeline.io.cache import Item, NodeCache
from pipeline.io.storage import Folder
from pipeline.reference.score_files import LOGPS
from pipeline.training.heartbeat import beat

if TYPE_CHECKING:
    from pipeline.data import Prepared
    from pipeline.reference import Scores

__all__ = ["check_room", "map_rows"]


def map_rows(cache: NodeCache, prepared: Prepared, scores: Scores | None, split: str, columns: Sequence[str]) -> Dataset:
    """Return the rows of a split, in the order of the store: its columns, and those of the scores.

    Raises:
        UserError: as `map_columns`.
    """
    pictures = pictures_on_node(cache, prepared, beat) if IMAGES in columns else None
    parts = _parts(prepared, scores, split, columns, pictures)
    # As files: a data-loader process that isn't forked maps them too, where it would get a copy of a table.
    tables = [MemoryMappedTable.from_file(str(map_columns(cache, part, beat))) for part in parts]
    # With a fingerprint: to compute one, `datasets` would read the rows.
    return Dataset(ConcatenationTable.from_tables(tables, axis=1), fingerprint="-".join(part.key for part in parts))


def check_room(cache: NodeCache, prepared: Prepared, scores: Scores | None, columns: Sequence[str]) -> None:
    """Check that the rows of all splits fit into the cache, with their scores and pictures, before any is brought.

    Raises:
        UserError: with the size that all of them need; as `map_rows`.
    """
    items: list[Item] = []
    pictures = prepared.folder
    if IMAGES in columns and not pictures.is_local:
        items.append(pictures_item(prepared, beat))
        pictures = Folder(cache.root / items[0].key)
    for split in (TRAIN, EVAL):
        if prepared.rows(split):
            parts = _parts(prepared, scores, split, columns, pictures if IMAGES in columns else None)
            items += [mapped_item(part, beat) for part in parts]
    cache.check_room(items)


def _parts(
    prepared: Prepared, scores: Scores | None, split: str, columns: Sequence[str], pictures: Folder | None
) -> list[StoredColumns]:
    kind = "training" if split == TRAIN else "evaluation"
    parts = [StoredColumns.of(prepared, split, columns, f"the {kind} rows", pictures)]
    if scores is not None:
        parts.append(StoredColumns.of(scores, split, LOGPS, f"the scores of the {kind} rows"))
    return parts
