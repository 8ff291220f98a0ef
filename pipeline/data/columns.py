"""The columns of a staged part, by kind of row."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.kinds import COMPLETIONS
from pipeline.data.tokenise import Tokenised
from pipeline.data.transforms import Rendered
from strategies.base import BatchKind

__all__ = ["STAGED_ONLY", "StagedRow", "staged_table"]

STAGED_ONLY = ["hash", "prompt_hash", "place"]
"""Columns that decide where a row goes and what its `row_id` is."""


@dataclass(frozen=True)
class StagedRow:
    """A row that is kept. `place` counts the rows of its file from 0, those that are not kept included."""

    row_number: int
    place: int
    text: Rendered
    ids: Tokenised


def staged_table(kind: BatchKind, rows: list[StagedRow]) -> pa.Table:
    """One row per kept row: numbers, ids, lengths, what belongs to the kind, text, and the columns of `STAGED_ONLY`."""
    texts = [row.text.as_row() for row in rows]
    handed = [json.dumps(row.text.handed, ensure_ascii=False) if kind == "prompt" else "" for row in rows]
    ids = {"prompt": [row.ids.prompt for row in rows]}
    for place, name in enumerate(COMPLETIONS[kind]):
        ids[name] = [row.ids.completions[place] for row in rows]
    columns: dict[str, pa.Array] = {"row_number": pa.array([row.row_number for row in rows], pa.int64())}
    columns |= {f"{name}_ids": pa.array(values, pa.list_(pa.int32())) for name, values in ids.items()}
    columns |= {f"{name}_length": pa.array([len(one) for one in values], pa.int32()) for name, values in ids.items()}
    if kind == "unpaired":
        columns["label"] = pa.array([row.text.label for row in rows], pa.bool_())
    columns |= {name: pa.array([text[name] for text in texts], pa.large_string()) for name in ids}
    if kind == "prompt":
        columns["row"] = pa.array(handed, pa.large_string())
    hashes = [_hash(row, beside) for row, beside in zip(rows, handed, strict=True)]
    columns["hash"] = pa.array(hashes, pa.binary(16))
    columns["prompt_hash"] = pa.array([_prompt_hash(row) for row in rows], pa.binary(16))
    columns["place"] = pa.array([row.place for row in rows], pa.int64())
    return pa.table(columns)


def _prompt_hash(row: StagedRow) -> bytes:
    """What makes the prompts of two rows the same: their text."""
    return hashlib.blake2b(row.text.prompt.encode(), digest_size=16).digest()


def _hash(row: StagedRow, handed: str) -> bytes:
    """What makes two rows the same: their ids, the label, and what the trainer of prompts is handed."""
    digest = hashlib.blake2b(f"{row.text.label}{handed}".encode(), digest_size=16)
    for ids in (row.ids.prompt, *row.ids.completions):
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.digest()
