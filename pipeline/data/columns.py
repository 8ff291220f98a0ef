"""Table of a staged part: its columns by kind of row."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.pictures import IMAGES
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.tokenize import Tokenised
from pipeline.data.transforms import Rendered
from strategies.types import BatchKind

__all__ = ["STAGED_ONLY", "StagedRow", "staged_table"]

STAGED_ONLY = ["hash", "prompt_hash", "place"]
"""Columns that decide a row's split and its `row_id` (`place` is `StagedRow.row_index`); the store doesn't keep them."""


@dataclass(frozen=True)
class StagedRow:
    """A row that is kept. `row_index` counts the rows of its file from 0, including those that are not kept."""

    row_number: int
    row_index: int
    text: Rendered
    ids: Tokenised
    images: tuple[str, ...] = ()
    """Names of its pictures, in the order of their placeholders."""


def staged_table(kind: BatchKind, rows: list[StagedRow]) -> pa.Table:
    """Return a table of the kept rows: row numbers, ids, lengths, columns of the kind, texts, pictures, and those of
    `STAGED_ONLY`.
    """
    texts = [row.text.as_row() for row in rows]
    # As JSON text: reward columns are the user's, so their types may differ from row to row.
    reward_columns = [json.dumps(row.text.reward_columns, ensure_ascii=False) if kind == "prompt" else "" for row in rows]
    ids = {"prompt": [row.ids.prompt for row in rows]}
    for index, name in enumerate(COMPLETIONS[kind]):
        ids[name] = [row.ids.completions[index] for row in rows]
    columns: dict[str, pa.Array] = {"row_number": pa.array([row.row_number for row in rows], pa.int64())}
    columns |= {f"{name}_ids": pa.array(values, pa.list_(pa.int32())) for name, values in ids.items()}
    # Lengths have columns of their own, so that percentiles, plans and checks needn't read the ids.
    columns |= {f"{name}_length": pa.array([len(value) for value in values], pa.int32()) for name, values in ids.items()}
    if kind == "unpaired":
        columns["label"] = pa.array([row.text.label for row in rows], pa.bool_())
    # large_string has 64-bit offsets: a column of long texts may exceed the 2 GiB of string.
    columns |= {name: pa.array([text[name] for text in texts], pa.large_string()) for name in ids}
    if kind == "prompt":
        columns["row"] = pa.array(reward_columns, pa.large_string())
    # Only where there are any, so that a store of text has the columns that it always had.
    if any(row.images for row in rows):
        columns[IMAGES] = pa.array([list(row.images) for row in rows], pa.list_(pa.string()))
    hashes = [_hash(row, json_text) for row, json_text in zip(rows, reward_columns, strict=True)]
    # Fixed width: `StagedRows.load` reads the bytes of all rows as one numpy array.
    columns["hash"] = pa.array(hashes, pa.binary(16))
    columns["prompt_hash"] = pa.array([_prompt_hash(row) for row in rows], pa.binary(16))
    columns["place"] = pa.array([row.row_index for row in rows], pa.int64())
    return pa.table(columns)


def _prompt_hash(row: StagedRow) -> bytes:
    # By text, not by ids: rows of one prompt belong to one split however they are tokenised.
    # The same question about another picture is another prompt.
    digest = hashlib.blake2b(row.text.prompt.encode(), digest_size=16)
    digest.update("".join(row.images).encode())
    return digest.digest()


def _hash(row: StagedRow, reward_columns: str) -> bytes:
    """Hash a row for deduplication: ids, label, pictures, and the columns for reward functions."""
    # Ids, not texts: rows with equal ids train the same.
    digest = hashlib.blake2b(f"{row.text.label}{reward_columns}".encode(), digest_size=16)
    for ids in (row.ids.prompt, *row.ids.completions):
        # Lengths are hashed too: the same ids split otherwise into prompt and completions are another row.
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(np.ascontiguousarray(ids).tobytes())
    digest.update("".join(row.images).encode())
    return digest.digest()
