"""Rows as the processes of a node share them: Arrow files in its cache, which every process maps and none copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from pipeline.data.pictures import IMAGES, picture_column
from pipeline.errors import UserError
from pipeline.io.cache import Item, NodeCache
from pipeline.io.digests import difference
from pipeline.io.retry import STORAGE_ERRORS, with_retries
from pipeline.io.storage import Folder, inside, reason
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["StoredColumns", "map_columns", "mapped_item", "open_mapped", "read_checked"]

FORMAT = 1
"""Incremented whenever the same columns would give other bytes."""
FILE = "rows.arrow"
READERS = 4
"""Files that are read at once: of a store at a URI most of the time is waited for."""
Beat = Callable[[], None]


class Store(Protocol):
    """Prepared rows, or scores."""

    @property
    def folder(self) -> Folder: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class StoredColumns:
    """Columns of some files of a store, in order."""

    folder: Folder
    files: tuple[dict[str, Any], ...]
    """Entries of the store's manifest: `file`, `rows`, `bytes`, `sha256`."""
    names: tuple[str, ...]
    what: str
    """Names them in messages, in the plural."""
    pictures: Folder | None = None
    """Store on this node with the files of `images`, a column that becomes list<struct<bytes, path>>, as trainers take it."""

    @classmethod
    def of(cls, store: Store, split: str, names: Sequence[str], what: str, pictures: Folder | None = None) -> Self:
        """Return columns of a split of a store; `files` is empty where it has no rows."""
        files = tuple(entry for entry in store.manifest["files"] if entry["file"].startswith(f"{split}/"))
        return cls(store.folder, files, tuple(names), what, pictures)

    @property
    def key(self) -> str:
        """Name in the cache, which says the bytes of the files and what is made of them."""
        listed = [[entry.get(name) for name in ("file", "rows", "bytes", "sha256")] for entry in self.files]
        pictures = str(self.pictures.where) if self.pictures is not None else None
        # Stores of earlier versions have no checksums: their location distinguishes them.
        where = None if all("sha256" in entry for entry in self.files) else str(self.folder.where)
        inputs = {"format": FORMAT, "columns": self.names, "pictures": pictures, "files": listed, "where": where}
        return f"rows-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]}"


def map_columns(cache: NodeCache, columns: StoredColumns, beat: Beat = lambda: None) -> Path:
    """Return the Arrow file (a stream) of columns in the node's cache, made once from the store's files.

    Args:
        columns: of one file at least.
        beat: called again and again while this takes time.

    Raises:
        UserError: when a file can't be read or isn't what the store's manifest says, and as `NodeCache.get`.
    """
    return cache.get(mapped_item(columns, beat), beat) / FILE


def mapped_item(columns: StoredColumns, beat: Beat = lambda: None) -> Item:
    """Return the entry of the cache that `map_columns` asks for."""

    def fill(folder: Path) -> None:
        _write(folder / FILE, ahead(partial(_read, columns, beat=beat), columns.files, READERS), beat)

    def size() -> int:
        first = columns.files[0]
        # From one file's: nothing else says the bytes of all before they are read.
        return int(_read(columns, first, beat).nbytes * sum(entry["rows"] for entry in columns.files) / first["rows"])

    return Item(columns.key, columns.what, size, fill)


def _write(path: Path, tables: Iterator[pa.Table], beat: Beat) -> None:
    import pyarrow as pa

    first = next(tables)
    with open(path, "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for table in chain([first], tables):
            # A batch for each file: lists within one have offsets of 32 bits.
            writer.write_table(table.cast(first.schema))
            beat()
    # Else the process that makes the file would keep what the tables took.
    pa.default_memory_pool().release_unused()


def _read(columns: StoredColumns, entry: dict[str, Any], beat: Beat) -> pa.Table:
    table = decoded(read_checked(columns.folder, entry, columns.what, beat), list(columns.names)).replace_schema_metadata(None)
    if columns.pictures is not None:
        index = columns.names.index(IMAGES)
        table = table.set_column(index, IMAGES, picture_column(columns.pictures, table[IMAGES]))
    return table.combine_chunks()


def read_checked(folder: Folder, entry: dict[str, Any], what: str, beat: Beat = lambda: None) -> bytes:
    """Read a file of a store, and compare it with its entry in the manifest.

    Raises:
        UserError: when it is missing, isn't what was written, or can't be read.
    """
    try:
        read = partial(_bytes, folder, entry["file"])
        # A disk that can't be read now can't be in a minute.
        data = read() if folder.is_local else with_retries(read, f"reading {what}", beat)
    except STORAGE_ERRORS as error:
        raise UserError(f"{inside(folder.where, entry['file'])} can't be read: {reason(error)}") from error
    # Stores of earlier versions have no checksums.
    problem = f"{entry['file']}: is missing" if data is None else difference(data, entry) if "sha256" in entry else None
    if data is None or problem is not None:
        raise UserError(
            f"dataset_prepared_path: {folder.where} doesn't hold {what} as they were written: {problem}; delete the folder, "
            "and the next run makes it again"
        )
    return data


def _bytes(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read_bytes(name)
    except FileNotFoundError:
        return None


def open_mapped(file: Path) -> pa.Table:
    """Map a result of `map_columns` into memory."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
