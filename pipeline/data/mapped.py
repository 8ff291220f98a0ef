"""Rows as the processes of a node share them: Arrow files in its cache, which every process maps and none copies."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline.data.pictures import IMAGES, picture_column
from pipeline.errors import UserError
from pipeline.io.cache import Item, NodeCache

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["StoredColumns", "map_columns", "open_mapped"]

FORMAT = 1
"""Incremented whenever the same columns would give other bytes."""
FILE = "rows.arrow"
READERS = 4
"""Files that are read at once, so that a store at a URI is not waited for."""


class Store(Protocol):
    """Prepared rows, or scores."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class StoredColumns:
    """Columns of some files of a store, in order."""

    folder: Path
    """The store's."""
    files: tuple[dict[str, Any], ...]
    """Entries of the store's manifest: `file`, `rows`, `bytes`, `sha256`."""
    names: tuple[str, ...]
    what: str
    """Names them in messages, in the plural."""
    pictures: Path | None = None
    """Store on this node with the files of `images`, a column that becomes list<struct<bytes, path>>, as trainers take it."""

    @classmethod
    def of(cls, store: Store, split: str, names: Sequence[str], what: str, pictures: Path | None = None) -> Self:
        """Return columns of a split of a store; `files` is empty where it has no rows."""
        files = tuple(entry for entry in store.manifest["files"] if entry["file"].startswith(f"{split}/"))
        return cls(store.path, files, tuple(names), what, pictures)

    @property
    def key(self) -> str:
        """Name in the cache, which says the bytes of the files and what is made of them."""
        told = [[entry.get(name) for name in ("file", "rows", "bytes", "sha256")] for entry in self.files]
        inputs = {"format": FORMAT, "columns": self.names, "pictures": str(self.pictures), "files": told}
        # Stores of earlier versions have no checksums: these are told apart by where they are.
        where = [] if all("sha256" in entry for entry in self.files) else [str(self.folder)]
        return f"rows-{hashlib.sha256(json.dumps([inputs, where]).encode()).hexdigest()[:32]}"


def map_columns(cache: NodeCache, columns: StoredColumns, beat: Callable[[], None] = lambda: None) -> Path:
    """Return the Arrow file (a stream) of columns in the node's cache, made once from the store's files.

    Args:
        columns: of one file at least.
        beat: called again and again while this takes time.

    Raises:
        UserError: when a file can't be read or isn't what the store's manifest says, and as `NodeCache.get`.
    """

    def fill(folder: Path) -> None:
        with ThreadPoolExecutor(READERS) as pool:
            _write(folder / FILE, _ahead(pool, columns), beat)

    def size() -> int:
        first = columns.files[0]
        # From one file's: nothing else says the bytes of all before they are read.
        return int(_read(columns, first).nbytes * sum(entry["rows"] for entry in columns.files) / first["rows"])

    return cache.get(Item(columns.key, columns.what, size, fill), beat) / FILE


def _write(path: Path, tables: Iterator[pa.Table], beat: Callable[[], None]) -> None:
    import pyarrow as pa

    first = next(tables)
    with open(path, "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for table in chain([first], tables):
            # A batch for each file: lists within one have offsets of 32 bits.
            writer.write_table(table.cast(first.schema))
            beat()


def _ahead(pool: ThreadPoolExecutor, columns: StoredColumns) -> Iterator[pa.Table]:
    """Yield the tables of all files in order, a few of which are read ahead: never all at once."""
    waiting: deque[Future[pa.Table]] = deque()
    for entry in columns.files:
        waiting.append(pool.submit(_read, columns, entry))
        if len(waiting) > READERS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(columns: StoredColumns, entry: dict[str, Any]) -> pa.Table:
    """Read the columns of one file, whose bytes are checked against its entry."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = columns.folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {os.strerror(error.errno or 0)}") from error
    if "sha256" in entry and hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise UserError(
            f"{path} isn't what was written there: it has {len(data)} bytes, {entry['bytes']} were written; delete the folder "
            f"{columns.folder}, and the next run makes it again"
        )
    table = pq.read_table(pa.BufferReader(data), columns=list(columns.names)).replace_schema_metadata(None)
    if columns.pictures is not None:
        index = columns.names.index(IMAGES)
        table = table.set_column(index, IMAGES, picture_column(columns.pictures, table[IMAGES]))
    return table.combine_chunks()


def open_mapped(file: Path) -> pa.Table:
    """Map a result of `map_columns` into memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
