"""The prepared store as others read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["EVAL", "MANIFEST", "REJECTED", "TRAIN", "Prepared", "open_store"]

TRAIN, EVAL, REJECTED = "train", "eval", "rejected"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """A complete store. Its rows stand in the order of the sources; shuffling is the trainer's business.

    `manifest["kind"]` says what a row holds. Columns of every kind: `row_id` (the raw row's place over all sources, from 0;
    a row of a dataset with `split_pairs` has two places, chosen first, taken or not), `source`, `row_number` (from 1, in its
    file; a line number in JSON lines), `prompt_ids` (list<int32>), `prompt_length`, and `prompt`, the text. Besides, by kind:

    * pair: `chosen_ids`, `rejected_ids`, `chosen_length`, `rejected_length`, and the text: `chosen`, `rejected`
    * unpaired: `completion_ids`, `completion_length`, `completion`, and `label` (bool)
    * prompt: `row`, which is what the trainer is handed, as JSON. Its `prompt` is text, or messages where the raw row has
      messages and no dataset type renders them; `prompt_ids` are what TRL makes of it. Its other keys are the raw row's other
      columns, those that JSON can't hold left out.
    """

    path: Path
    fingerprint: str
    train_rows: int
    eval_rows: int
    rejected_rows: int
    manifest: dict[str, Any]

    def _repr_html_(self) -> str:
        from pipeline.data.preview import print_counts
        from pipeline.notebook import html_of

        return html_of(lambda console: print_counts(self, console))

    @property
    def notes(self) -> list[str]:
        """What a person should know of the data: each with how many rows it is about, an example, and what to do."""
        from pipeline.data.notes import sentences

        return sentences(self.manifest.get("notes", []))

    def train_files(self) -> list[Path]:
        return self.files(TRAIN)

    def eval_files(self) -> list[Path]:
        return self.files(EVAL)

    def rows(self, split: str) -> int:
        """How many rows `train`, `eval` or `rejected` has."""
        return {TRAIN: self.train_rows, EVAL: self.eval_rows, REJECTED: self.rejected_rows}[split]

    def files(self, split: str) -> list[Path]:
        """Of `train`, `eval` or `rejected`, in order."""
        return [self.path / entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]

    def read(self, split: str = TRAIN, columns: list[str] | None = None) -> pa.Table:
        """All rows of `train`, `eval` or `rejected` as one table, in order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert split in (TRAIN, EVAL, REJECTED), split
        tables = [pq.read_table(file, columns=columns, partitioning=None) for file in self.files(split)]
        return pa.concat_tables(tables) if tables else pa.table({})


def open_store(folder: Path) -> Prepared | None:
    """The store in `folder`; None when it is not there or not complete."""
    manifest_file = folder / MANIFEST
    if not manifest_file.exists():
        return None
    manifest = json.loads(manifest_file.read_text())
    rows = {TRAIN: 0, EVAL: 0, REJECTED: 0}
    for entry in manifest["files"]:
        rows[entry["file"].split("/")[0]] += entry["rows"]
    return Prepared(folder, manifest["fingerprint"], rows[TRAIN], rows[EVAL], rows[REJECTED], manifest)
