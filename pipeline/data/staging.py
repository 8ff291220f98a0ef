"""The work of one task: the rows of a shard become staged parts, one file per `rows_per_part` rows.

A part that is there is not computed again; that is all that resuming a killed run takes.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.columns import StagedRow, staged_table
from pipeline.data.files import write_table
from pipeline.data.kinds import kind_of
from pipeline.data.length import fit_all
from pipeline.data.notes import Note, Tally
from pipeline.data.sources.readers import RawRow, read_rows
from pipeline.data.sources.shards import Shard
from pipeline.data.tokenise import Tokenised, tokenise
from pipeline.data.transforms import Rendered, RowError, Transform, TypeFailed, build_transform
from pipeline.data.transforms.base import Context
from pipeline.data.transforms.control import control_pattern, control_tokens, spell, spelled
from pipeline.errors import UserError
from strategies.base import BatchKind
from strategies.plugins import PluginError, Plugins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Job", "stage_shard"]

FIRST_BAD = 5
SUMMARY = b"prefray"
REJECTED_SCHEMA = pa.schema(
    [("source", pa.string()), ("row_number", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)


@dataclass(frozen=True)
class Job:
    """All that a task needs. `datasets` and `templates` (Jinja or None) go by `Shard.dataset`."""

    rl: str
    tokenizer: PreTrainedTokenizerBase
    datasets: tuple[dict[str, Any], ...]
    templates: tuple[str | None, ...]
    shards: tuple[Shard, ...]
    sequence_len: int
    excess_length_strategy: str
    rows_per_part: int
    folder: Path
    plugins: Plugins
    encode_special_tokens: bool = True

    @property
    def kind(self) -> BatchKind:
        return kind_of(self.rl)

    @cached_property
    def _most_characters(self) -> int:
        """Of a row that may fit: no token stands for more than its own text has, or a few more that were normalised away."""
        return 4 * self.sequence_len * max(map(len, self.tokenizer.get_vocab()), default=1)

    @cached_property
    def text_only(self) -> re.Pattern[str] | None:
        """The control tokens that are text in rows; None where they are themselves."""
        return None if self.encode_special_tokens else control_pattern(self.tokenizer)

    @cached_property
    def is_control(self) -> NDArray[np.bool_]:
        """Whether an id is a control token's. Shape: (vocabulary,)."""
        control = np.zeros(max([len(self.tokenizer), *self.tokenizer.get_vocab().values()]) + 1, dtype=bool)
        control[self.tokenizer.convert_tokens_to_ids(sorted(control_tokens(self.tokenizer)))] = True
        return control

    def drops(self, texts: list[Rendered]) -> bool:
        """Whether a row is dropped for its length, without a look at its tokens: for megabytes that takes a minute."""
        lengths = [max(map(len, (text.prompt, *text.sequences))) for text in texts]
        return self.excess_length_strategy == "drop" and min(lengths) > self._most_characters

    def transform(self, dataset: int) -> Transform:
        return build_transform(self.rl, Context(self.tokenizer, self.templates[dataset], self.datasets[dataset]))


@dataclass
class Part:
    """One staged part while it grows. `end` is the place after its last row's."""

    kept: list[StagedRow] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    end: int = 0
    too_long: int = 0
    truncated: int = 0
    notes: Tally = field(default_factory=Tally)

    def reject(self, source: str, row: RawRow, reason: str) -> None:
        raw = row.raw or json.dumps(row.value, ensure_ascii=False, default=str)
        raw = raw.encode(errors="backslashreplace").decode()
        self.rejected.append({"source": source, "row_number": row.index + 1, "reason": reason, "raw": raw})


def stage_shard(job: Job, shard: Shard) -> Iterator[dict[str, Any]]:
    """Stage every part of a shard; yields each part's summary, those of parts found in place included.

    Raises:
        UserError: for a file that cannot be read, a missing chat template, a row too long under `raise`, a plugin that fails.
        OSError: when a part cannot be written.
    """
    try:
        job.plugins.load()
    except PluginError as error:
        raise UserError(str(error)) from error
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
    places = 2 if transform.splits_pairs else 1
    for row in rows:
        part.read, part.end = part.read + 1, (row.index + 1) * places
        try:
            texts = [_encodable(text) for text in transform.rows(spell(_value(row), job.text_only))]
            if job.drops(texts):
                part.too_long += len(texts)
            else:
                rendered.append((row, texts))
        except RowError as error:
            part.reject(source, row, spelled(str(error)))
        except TypeFailed as error:
            raise UserError(f"row {row.index + 1} of {source}: {error}") from error
    tokenised = tokenise([text for _, texts in rendered for text in texts], job.tokenizer)
    for row, texts in rendered:
        _keep(job, part, source, row, [(text, next(tokenised)) for text in texts])
    return part


def _encodable(text: Rendered) -> Rendered:
    """The text, when it can be written as UTF-8: half of a surrogate pair, which JSON can escape, can't."""
    try:
        "".join((text.prompt, *text.sequences, json.dumps(text.handed, ensure_ascii=False))).encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text is not valid Unicode: {error.reason}") from error
    return text


def _value(row: RawRow) -> dict[str, Any]:
    if row.value is None:
        raise RowError(row.fault)
    return row.value


def _keep(job: Job, part: Part, source: str, row: RawRow, made: list[tuple[Rendered, Tokenised]]) -> None:
    """Take over the prepared rows that a raw row has become: all or none, but for those that are too long."""
    if not all(len(ids.prompt) for _, ids in made):
        part.reject(source, row, "the prompt has no tokens, so nothing predicts the first token of the answer")
        return
    if not all(len(completion) for _, ids in made for completion in ids.completions):
        part.reject(source, row, "an answer has no tokens of its own")
        return
    if any(job.is_control[completion].all() for _, ids in made for completion in ids.completions):
        part.reject(source, row, "an answer is nothing but control tokens")
        return
    notes = [replace(note, example=spelled(note.example)) for note in (*made[0][0].notes, *_control_notes(job, made))]
    part.notes.add(source, row.index + 1, notes)
    all_fitted = fit_all([ids for _, ids in made], job.sequence_len, job.excess_length_strategy)
    for half, ((text, ids), fitted) in enumerate(zip(made, all_fitted, strict=True)):
        if fitted is None and job.excess_length_strategy == "raise":
            raise UserError(
                f"excess_length_strategy: raise, and row {row.index + 1} of {source} has {ids.length} tokens, more than "
                f"sequence_len {job.sequence_len}; raise sequence_len, or set excess_length_strategy to drop or truncate"
            )
        part.too_long += fitted is None
        if fitted is not None:
            part.truncated += fitted is not ids
            part.kept.append(StagedRow(row.index + 1, row.index * len(made) + half, text.changed(spelled), fitted))


def _control_notes(job: Job, made: list[tuple[Rendered, Tokenised]]) -> Iterator[Note]:
    """Control tokens within answers of plain text, before their end."""
    for text, ids in made:
        for completion in () if text.templated else ids.completions:
            for token in dict.fromkeys(completion[:-1][job.is_control[completion[:-1]]].tolist()):
                yield Note("control_tokens", job.tokenizer.convert_ids_to_tokens(token), text.sequences[0][len(text.prompt) :])


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
        "conversational": sum(row.text.handed is not None and row.text.templated for row in part.kept),
        "rejected": len(part.rejected),
        "too_long": part.too_long,
        "truncated": part.truncated,
        "notes": part.notes.entries(),
        "first_bad": [{key: row[key] for key in ("source", "row_number", "reason")} for row in part.rejected[:FIRST_BAD]],
    }
    table = staged_table(job.kind, part.kept)
    write_table(table.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()}), path)
