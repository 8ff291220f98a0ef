"""Reader of the prepared store."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pipeline.data.notes import sentences
from pipeline.data.pictures import picture_damage
from pipeline.errors import UserError
from pipeline.io.digests import damage
from pipeline.ui.console import Printable, table_of

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CHECKSUM", "COUNTS", "EVAL", "MANIFEST", "REJECTED", "TRAIN", "Prepared", "checksum", "open_store"]

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

    path: Path
    fingerprint: str
    train_rows: int
    eval_rows: int
    rejected_rows: int
    manifest: dict[str, Any]

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

    def train_files(self) -> list[Path]:
        return self.files(TRAIN)

    def eval_files(self) -> list[Path]:
        return self.files(EVAL)

    def rows(self, split: str) -> int:
        """Return the number of rows of `train`, `eval` or `rejected`."""
        return {TRAIN: self.train_rows, EVAL: self.eval_rows, REJECTED: self.rejected_rows}[split]

    def files(self, split: str) -> list[Path]:
        """Return the files of `train`, `eval` or `rejected`, in order."""
        return [self.path / entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]

    def read(self, split: str = TRAIN, columns: list[str] | None = None) -> pa.Table:
        """Read all rows of `train`, `eval` or `rejected` into one table, in order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert split in (TRAIN, EVAL, REJECTED), split
        tables = [pq.read_table(file, columns=columns, partitioning=None) for file in self.files(split)]
        return pa.concat_tables(tables) if tables else pa.table({})


def checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its checksum."""
    fields = {name: value for name, value in manifest.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_manifest(file: Path) -> dict[str, Any]:
    """Read a manifest; raise UserError if it was changed, or belongs to another folder."""
    try:
        manifest = json.loads(file.read_text())
        is_old = manifest["format_version"] < CHECKED_FROM and CHECKSUM not in manifest  # for reports of old runs
        # A folder that was renamed, or copied over another, would pass for data that it doesn't hold.
        sound = manifest["fingerprint"] == file.parent.name and (is_old or manifest[CHECKSUM] == checksum(manifest))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"dataset_prepared_path: {file} isn't what was written there; delete the folder, and the next run prepares it again"
        )
    return manifest


def open_store(folder: Path, verify: bool = True) -> Prepared | None:
    """Open the store in `folder`; returns None when it doesn't exist or isn't complete.

    Args:
        verify: read every file once, and compare its size and hash with the manifest; of pictures, compare the size.

    Raises:
        UserError: when a file is missing or was changed.
    """
    manifest_file = folder / MANIFEST
    if not manifest_file.exists():
        return None
    manifest = _read_manifest(manifest_file)
    # Stores of earlier versions have no hashes, and can still be shown.
    problems = [damage(folder / entry["file"], entry) for entry in manifest["files"] if verify and "sha256" in entry]
    if verify and "picture_list" in manifest:
        problems += picture_damage(folder, manifest["picture_list"])
    if damaged := [problem for problem in problems if problem is not None]:
        raise UserError(
            f"dataset_prepared_path: {folder} doesn't hold what was prepared: {damaged[0]}"
            f"{f', and {len(damaged) - 1} more' * (len(damaged) > 1)}; delete the folder, and the next run prepares it again"
        )
    rows = {TRAIN: 0, EVAL: 0, REJECTED: 0}
    for entry in manifest["files"]:
        rows[entry["file"].split("/")[0]] += entry["rows"]
    return Prepared(folder, manifest["fingerprint"], rows[TRAIN], rows[EVAL], rows[REJECTED], manifest)
