"""Reader of the prepared store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pipeline.data.notes import sentences
from pipeline.data.pictures import picture_damage
from pipeline.errors import UserError
from pipeline.io.digests import difference
from pipeline.io.outputs import check_output
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, locate, reason
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead
from pipeline.ui.console import Printable, table_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CHECKSUM",
    "COUNTS",
    "EVAL",
    "MANIFEST",
    "REJECTED",
    "TRAIN",
    "Prepared",
    "check_root",
    "checksum",
    "open_store",
    "prepared_root",
]

TRAIN, EVAL, REJECTED = "train", "eval", "rejected"
MANIFEST, CHECKSUM = "manifest.json", "checksum"
COUNTS = ("read", "rejected", "too_long", "truncated", "duplicates", "train", "eval")
CHECKED_FROM = 4
"""Format version of the first stores with checksums."""


@dataclass(frozen=True)
class Prepared(Printable):
    """A complete store. Its rows are in the order of the sources; the trainer shuffles them.

    `manifest["kind"]` is the kind of its rows. Columns of every kind: `row_id` (the raw row's index over all sources, from 0;
    a row of a dataset with `split_pairs` has two indices, chosen first, kept or not), `source`, `row_number` (from 1, in its
    file; a line number in JSON lines), `prompt_ids` (list<int32>), `prompt_length`, and `prompt`, the text. Others by kind:

    * pair: `chosen_ids`, `rejected_ids`, `chosen_length`, `rejected_length`, and the text: `chosen`, `rejected`
    * unpaired: `completion_ids`, `completion_length`, `completion`, and `label` (bool)
    * prompt: `row`, the columns that the trainer receives, as JSON. Its `prompt` is text, or messages where the raw row has
      messages and no dataset type renders them; `prompt_ids` are those that TRL computes from it. Its other keys are the raw
      row's other columns, without those that JSON can't represent.

    Where any row has pictures, `manifest["pictures"]` is their number, and every row has `images`: the names of its pictures,
    in the order of their placeholders in `prompt`. `pipeline.data.pictures.picture_path` gives their files. In `prompt_ids`
    the placeholders are expanded to the tokens that the model has for the picture.
    """

    path: Location
    fingerprint: str
    train_rows: int
    eval_rows: int
    rejected_rows: int
    manifest: dict[str, Any]
    folder: Folder = field(repr=False, compare=False)
    """By which `path` is read, also by the workers that it is sent to."""

    def __rich__(self) -> Group:
        sources, lengths = self.manifest["sources"], self.manifest["lengths"]
        rows = [(source["path"], *(f"{source[name]:,}" for name in COUNTS)) for source in sources]
        tokens = [(name, *(f"{value:,}" for value in values.values())) for name, values in lengths.items()]
        return Group(
            Text(f"prepared {self.path}"),
            table_of(("source", *(name.replace("_", " ") for name in COUNTS)), rows, title="rows"),
            table_of(("", *next(iter(lengths.values()))), tokens, title="tokens per row"),
            *(Text(f"note: {note}") for note in self.notes),
        )

    @property
    def notes(self) -> list[str]:
        """Notes on the data, each with a row count, an example and advice."""
        return sentences(self.manifest.get("notes", []))

    def rows(self, split: str) -> int:
        """Return the number of rows of `train`, `eval` or `rejected`."""
        return {TRAIN: self.train_rows, EVAL: self.eval_rows, REJECTED: self.rejected_rows}[split]

    def parts(self, split: str) -> list[str]:
        """Return the names of the files of `train`, `eval` or `rejected`, in order, such as `train/part-00000.parquet`."""
        assert split in (TRAIN, EVAL, REJECTED), split
        return [entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]

    def read_part(self, part: str, columns: list[str] | None = None) -> pa.Table:
        """Read a file of `parts`. At a URI its bytes are compared with the manifest, where all columns are read.

        Raises:
            UserError: when it is missing or was changed, and when a URI can't be read.
            OSError, pyarrow.ArrowException: when a local file can't be read.
        """
        with _readable(self.folder, part):
            if self.folder.is_local or columns is not None:
                return self.folder.read_table(part, columns)
            [entry] = [entry for entry in self.manifest["files"] if entry["file"] == part]
            data = self.folder.read_bytes(part)
        if (problem := difference(data, entry)) is not None:
            raise UserError(_not_as_prepared(self.folder, [problem]))
        return decoded(data)

    def tables(self, split: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of `train`, `eval` or `rejected` part by part, in order. Raises as `read_part`."""
        read = ahead if not self.folder.is_local else map
        yield from read(lambda part: self.read_part(part, columns), self.parts(split))

    def read(self, split: str = TRAIN, columns: list[str] | None = None) -> pa.Table:
        """Read all rows of `train`, `eval` or `rejected` into one table, in order. Raises as `read_part`."""
        import pyarrow as pa

        tables = list(self.tables(split, columns))
        return pa.concat_tables(tables) if tables else pa.table({})

    def files(self, split: str) -> list[Path]:
        """Return the paths of `parts`, of a store on a local path."""
        assert isinstance(self.path, Path), self.path
        return [self.path / part for part in self.parts(split)]

    def train_files(self) -> list[Path]:
        return self.files(TRAIN)

    def eval_files(self) -> list[Path]:
        return self.files(EVAL)


def prepared_root(location: str) -> Folder:
    """Return the folder of all prepared data and scores.

    Args:
        location: `dataset_prepared_path`.

    Raises:
        UserError: for a URI that can't be opened, or holds a key.
    """
    try:
        check_output(location)
        folder = Folder(locate(location))
    except UserError as error:
        raise UserError(f"dataset_prepared_path: {error}") from error
    except STORAGE_ERRORS as error:
        raise UserError(f"dataset_prepared_path: {location!r} can't be reached: {reason(error)}") from error
    if not folder.path:
        raise UserError(f"dataset_prepared_path: {location!r} is a whole store; give a folder in it")
    return folder


def check_root(location: str) -> Folder:
    """Return `prepared_root` once it is known that a remote one can be written, or holds prepared data that can be read.

    Raises:
        UserError: as `prepared_root`, and when it can't.
    """
    root, has_data = prepared_root(location), False
    # A local path is created when something is written, since a command may only read.
    if root.is_local:
        return root
    try:
        has_data = bool(root.names())
        root.create()
    except STORAGE_ERRORS as error:
        # Complete data need no permission to write.
        if not has_data:
            raise UserError(f"dataset_prepared_path: {location!r} can't be written: {reason(error)}") from error
    return root


def checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its checksum."""
    fields = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Folder, text: bytes) -> dict[str, Any]:
    """Parse a manifest; raise UserError if it was changed, or belongs to another folder."""
    try:
        manifest = json.loads(text)
        is_old = manifest["format_version"] < CHECKED_FROM and CHECKSUM not in manifest  # for reports of old runs
        # A folder that was renamed, or copied over another, would pass for data that it doesn't hold.
        sound = manifest["fingerprint"] == folder.name and (is_old or manifest[CHECKSUM] == checksum(manifest))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"dataset_prepared_path: {inside(folder.where, MANIFEST)} isn't what was written there; delete the folder, and the "
            "next run prepares it again"
        )
    return manifest


def open_store(where: Folder | Location, verify: bool = True) -> Prepared | None:
    """Open a store; returns None when it doesn't exist or isn't complete.

    Args:
        where: its folder.
        verify: compare every file with the manifest: size and hash, which reads each once; of pictures, and of files at a URI,
            the size.

    Raises:
        UserError: when a file is missing or was changed, and when a URI can't be read.
    """
    folder = where if isinstance(where, Folder) else Folder(where)
    with _readable(folder, MANIFEST):
        if not folder.exists(MANIFEST):
            return None
        manifest = _read_manifest(folder, folder.read_bytes(MANIFEST))
        damaged = _damage(folder, manifest) if verify else []
    if damaged:
        raise UserError(_not_as_prepared(folder, damaged))
    rows = {TRAIN: 0, EVAL: 0, REJECTED: 0}
    for entry in manifest["files"]:
        rows[entry["file"].split("/")[0]] += entry["rows"]
    counts = rows[TRAIN], rows[EVAL], rows[REJECTED]
    return Prepared(folder.where, manifest["fingerprint"], *counts, manifest, folder)


def _damage(folder: Folder, manifest: dict[str, Any]) -> list[str]:
    """Return how a store differs from its manifest, a phrase for each file."""
    # One request for all sizes.
    sizes = None if folder.is_local else folder.files()
    # Stores of earlier versions have no hashes, and can still be shown.
    problems = [folder.damage(entry, sizes) for entry in manifest["files"] if "sha256" in entry]
    if "picture_list" in manifest:
        problems += picture_damage(folder, manifest["picture_list"], sizes)
    return [problem for problem in problems if problem is not None]


@contextmanager
def _readable(folder: Folder, name: str) -> Iterator[None]:
    """Raise UserError for a file that is missing or, at a URI, can't be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(_not_as_prepared(folder, [f"{name}: is missing"])) from error
    except STORAGE_ERRORS as error:
        if folder.is_local:
            raise
        raise UserError(f"dataset_prepared_path: {inside(folder.where, name)} can't be read: {reason(error)}") from error


def _not_as_prepared(folder: Folder, damaged: list[str]) -> str:
    return (
        f"dataset_prepared_path: {folder.where} doesn't hold what was prepared: {damaged[0]}"
        f"{f', and {len(damaged) - 1} more' * (len(damaged) > 1)}; delete the folder, and the next run prepares it again"
    )
