"""The work of one task: the rows of a shard become staged parts, one file per `rows_per_part` rows.

A part that is there is not computed again; that is all that resuming a killed run takes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import write_table
from pipeline.data.length import fit
from pipeline.data.sources.readers import RawRow, read_rows
from pipeline.data.sources.shards import Shard
from pipeline.data.tokenise import Tokenised, tokenise
from pipeline.data.transforms import Rendered, RowError, Transform, build_transform
from pipeline.data.transforms.base import Context
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Job", "completion_names", "stage_shard"]

FIRST_BAD = 5
SUMMARY = b"prefray"
REJECTED_SCHEMA = pa.schema(
    [("source", pa.string()), ("row_number", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)


@dataclass(frozen=True)
class Job:
    """All that a task needs. `datasets` and `templates` (Jinja or None) go by `Shard.dataset`."""

    kind: str
    tokenizer: PreTrainedTokenizerBase
    datasets: tuple[dict[str, Any], ...]
    templates: tuple[str | None, ...]
    shards: tuple[Shard, ...]
    sequence_len: int
    excess_length_strategy: str
    rows_per_part: int
    folder: Path

    def transform(self, dataset: int) -> Transform:
        return build_transform(self.kind, Context(self.tokenizer, self.templates[dataset], self.datasets[dataset]))


@dataclass
class Part:
    """One staged part while it grows."""

    kept: list[tuple[RawRow, Rendered, Tokenised]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    end: int = 0
    too_long: int = 0
    truncated: int = 0

    def reject(self, source: str, row: RawRow, reason: str) -> None:
        raw = row.raw or json.dumps(row.value, ensure_ascii=False, default=str)
        raw = raw.encode(errors="backslashreplace").decode()
        self.rejected.append({"source": source, "row_number": row.index + 1, "reason": reason, "raw": raw})


def completion_names(kind: str) -> tuple[str, ...]:
    return ("completion",) if kind == "kto" else ("chosen", "rejected")


def stage_shard(job: Job, shard: Shard) -> Iterator[dict[str, Any]]:
    """Stage every part of a shard; yields each part's summary, those of parts found in place included.

    Raises:
        UserError: for a file that cannot be read, a missing chat template, or a row too long under `raise`.
        OSError: when a part cannot be written.
    """
    if (found := _all_there(job, shard)) is not None:
        yield from found
        return
    transform = job.transform(shard.dataset)
    for group, rows in itertools.groupby(read_rows(shard), key=lambda row: row.index // job.rows_per_part):
        path = _path(job, shard, max(group * job.rows_per_part, shard.start))
        if not path.exists():
            _write_part(job, shard, path, _fill(job, shard, transform, rows))
        yield _summary(path)


def _path(job: Job, shard: Shard, start: int) -> Path:
    """Names sort in the order of the sources."""
    return job.folder / f"{shard.dataset:04d}-{shard.file:06d}-{start:012d}.parquet"


def _all_there(job: Job, shard: Shard) -> list[dict[str, Any]] | None:
    """The summaries of a shard whose parts are all in place, so that it need not even be read."""
    if shard.stop is None:
        return None
    first = shard.start // job.rows_per_part * job.rows_per_part
    starts = range(first, shard.stop, job.rows_per_part)
    paths = [_path(job, shard, max(start, shard.start)) for start in starts]
    return [_summary(path) for path in paths] if all(path.exists() for path in paths) else None


def _summary(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(path).metadata[SUMMARY])


def _fill(job: Job, shard: Shard, transform: Transform, rows: Iterable[RawRow]) -> Part:
    part, source, rendered = Part(), shard.located.name, []
    for row in rows:
        part.read, part.end = part.read + 1, row.index + 1
        try:
            rendered.append((row, _encodable(transform.render(_value(row)))))
        except RowError as error:
            part.reject(source, row, str(error))
    tokenised = tokenise([text for _, text in rendered], job.tokenizer)
    for (row, text), ids in zip(rendered, tokenised, strict=True):
        _keep(job, part, source, row, text, ids)
    return part


def _encodable(text: Rendered) -> Rendered:
    """The text, when it can be written as UTF-8: half of a surrogate pair, which JSON can escape, can't."""
    try:
        "".join((text.prompt, *text.sequences)).encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text is not valid Unicode: {error.reason}") from error
    return text


def _value(row: RawRow) -> dict[str, Any]:
    if row.value is None:
        raise RowError(row.fault)
    return row.value


def _keep(job: Job, part: Part, source: str, row: RawRow, text: Rendered, ids: Tokenised) -> None:
    if not len(ids.prompt):
        part.reject(source, row, "the prompt has no tokens, so nothing predicts the first token of the answer")
        return
    if not all(map(len, ids.completions)):
        part.reject(source, row, "an answer has no tokens of its own")
        return
    fitted = fit(ids, job.sequence_len, job.excess_length_strategy)
    if fitted is None and job.excess_length_strategy == "raise":
        raise UserError(
            f"excess_length_strategy: raise, and row {row.index + 1} of {source} has {ids.length} tokens, more than "
            f"sequence_len {job.sequence_len}; raise sequence_len, or set excess_length_strategy to drop or truncate"
        )
    part.too_long += fitted is None
    if fitted is not None:
        part.truncated += fitted is not ids
        part.kept.append((row, text, fitted))


def _write_part(job: Job, shard: Shard, path: Path, part: Part) -> None:
    """The rejected rows first: where the part stands, all of it does."""
    if part.rejected:
        write_table(pa.Table.from_pylist(part.rejected, REJECTED_SCHEMA), path.with_suffix(".rejected"))
    summary = {
        "part": path.name,
        "dataset": shard.dataset,
        "file": shard.file,
        "source": shard.located.name,
        "read": part.read,
        "end": part.end,
        "rows": len(part.kept),
        "rejected": len(part.rejected),
        "too_long": part.too_long,
        "truncated": part.truncated,
        "first_bad": [{key: row[key] for key in ("source", "row_number", "reason")} for row in part.rejected[:FIRST_BAD]],
    }
    table = _table(job.kind, part.kept)
    write_table(table.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()}), path)


def _table(kind: str, rows: list[tuple[RawRow, Rendered, Tokenised]]) -> pa.Table:
    texts = [text.as_row() for _, text, _ in rows]
    ids = {"prompt": [tokens.prompt for *_, tokens in rows]}
    for place, name in enumerate(completion_names(kind)):
        ids[name] = [tokens.completions[place] for *_, tokens in rows]
    columns: dict[str, pa.Array] = {"row_number": pa.array([row.index + 1 for row, *_ in rows], pa.int64())}
    columns |= {f"{name}_ids": pa.array(values, pa.list_(pa.int32())) for name, values in ids.items()}
    columns |= {f"{name}_length": pa.array([len(one) for one in values], pa.int32()) for name, values in ids.items()}
    if kind == "kto":
        columns["label"] = pa.array([text.label for _, text, _ in rows], pa.bool_())
    columns |= {name: pa.array([text[name] for text in texts], pa.large_string()) for name in ids}
    columns["hash"] = pa.array([_hash(text.label, tokens) for _, text, tokens in rows], pa.binary(16))
    return pa.table(columns)


def _hash(label: bool | None, tokens: Tokenised) -> bytes:
    """What makes two rows the same: their ids, and the label."""
    digest = hashlib.blake2b(str(label).encode(), digest_size=16)
    for ids in (tokens.prompt, *tokens.completions):
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(np.ascontiguousarray(ids).tobytes())
    return digest.digest()
