"""Preparation of one shard in a task: its rows become staged parts, one file per `rows_per_part` rows.

Existing parts are not computed again, which is how a killed run resumes.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.data.columns import StagedRow, staged_table
from pipeline.data.job import Job
from pipeline.data.notes import Note, Tally
from pipeline.data.shard_pictures import PreparedPicture, ShardPictures, without_data
from pipeline.data.sources.pictures import HostFailed
from pipeline.data.sources.readers import RawRow, read_rows
from pipeline.data.sources.shards import Shard
from pipeline.data.staged_parts import part_name, part_names, whole_parts, write_part
from pipeline.data.tokenize import Tokenised, tokenise
from pipeline.data.transforms import Rendered, RowError, Transform, TypeFailed
from pipeline.data.transforms.control import escape, unescape
from pipeline.data.transforms.marks import without_marks
from pipeline.data.truncation import truncate_all
from pipeline.errors import UserError
from strategies.plugins import PluginError

if TYPE_CHECKING:
    pass

__all__ = ["stage_shard"]

FIRST_BAD = 5
AHEAD = 16
"""Rows whose pictures are fetched ahead: their bytes are in memory."""
T = TypeVar("T")


@dataclass
class Part:
    """One staged part under construction. `end` is the index after that of its last row."""

    kept: list[StagedRow] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    end: int = 0
    too_long: int = 0
    truncated: int = 0
    notes: Tally = field(default_factory=Tally)

    def reject(self, source: str, row: RawRow, reason: str) -> None:
        # The row as it was given where it doesn't parse; else as JSON, whatever its format.
        raw = row.raw or json.dumps(without_data(row.value), ensure_ascii=False, default=str)
        # Parquet takes only valid UTF-8, and a row may be rejected for a lone surrogate.
        raw = raw.encode(errors="backslashreplace").decode()
        self.rejected.append({"source": source, "row_number": row.index + 1, "reason": reason, "raw": raw})


def stage_shard(job: Job, shard: Shard) -> Iterator[dict[str, Any]]:
    """Stage every part of a shard; yields the summary of each part, existing ones included.

    Raises:
        UserError: for a file that cannot be read, a missing chat template, a row too long under `raise`, a plugin that fails.
        OSError: when a part cannot be written.
    """
    try:
        # In the task: its process may be another than the driver's, without the plugins' dataset types.
        job.plugins.load()
    except PluginError as error:
        raise UserError(str(error)) from error
    staged = whole_parts(job.staging, shard)
    # Without the number of rows, the parts to expect are unknown until the file has been read.
    if shard.stop is not None and staged.keys() >= set(expected := part_names(shard, job.rows_per_part)):
        yield from (staged[name] for name in expected)
        return
    transform, pictures = job.transform(shard.dataset), job.pictures(shard)
    # By index in the file, as `part_names` expects the parts, not by the order of reading.
    for group, rows in itertools.groupby(read_rows(shard), key=lambda row: row.index // job.rows_per_part):
        # A shard that begins within a group (a row group of Parquet, a slice) has a file of its own for its rest.
        name = part_name(shard, max(group * job.rows_per_part, shard.start))
        if name not in staged:
            staged[name] = _write_part(job, shard, name, _process_rows(job, shard, transform, pictures, rows))
        yield staged[name]


@dataclass(frozen=True)
class _RenderedRow:
    """A raw row with its texts, one or the two halves of a pair, and the pictures of its prompt."""

    row: RawRow
    texts: list[Rendered]
    pictures: tuple[PreparedPicture, ...] = ()


def _process_rows(job: Job, shard: Shard, transform: Transform, pictures: ShardPictures | None, rows: Iterable[RawRow]) -> Part:
    part, source, rendered = Part(), shard.located.name, list[_RenderedRow]()
    # Each half of a split pair has an index of its own, from which `row_id` follows.
    indices_per_row = 2 if transform.splits_pairs else 1
    for row, texts in _ahead(rows, lambda row: _texts(job, transform, source, pictures, row), pictures is not None):
        # Counted before anything can reject the row, so that row ids don't depend on which rows are kept.
        part.read, part.end = part.read + 1, (row.index + 1) * indices_per_row
        try:
            if isinstance(texts, RowError):
                raise texts
            if job.is_too_long(texts):
                part.too_long += len(texts)
            else:
                rendered.append(_rendered(row, texts, pictures))
        except RowError as error:
            # Without the value of one that is nested too deep, at which `json.dumps` would fail as well.
            part.reject(source, replace(row, value=None) if isinstance(error, TooDeep) else row, _reason(error))
            if isinstance(error, HostFailed):
                part.notes.add(source, row.index + 1, [Note("unreachable", error.host, str(error))])
    # All rows of the part at once, for the tokenizer's threads.
    whole = [text if pictures is None else pictures.expanded(text, one.pictures) for one in rendered for text in one.texts]
    tokenised = tokenise(whole, job.tokenizer)
    for one in rendered:
        prepared = [(text, next(tokenised)) for text in one.texts]
        if pictures is not None:
            pictures.compare(*prepared[0], one.pictures)
        problem = None if pictures is None else pictures.problem([ids for _, ids in prepared], one.pictures)
        if problem is not None:
            part.reject(source, one.row, problem)
        else:
            _add_rows(job, part, source, one.row, prepared, tuple(picture.name for picture in one.pictures))
    return part


class TooDeep(RowError):
    """A row with a value nested too deep to be read."""


def _reason(error: RowError) -> str:
    return without_marks(unescape(str(error)))


def _texts(
    job: Job, transform: Transform, source: str, pictures: ShardPictures | None, row: RawRow
) -> list[Rendered] | RowError:
    """Return the texts of a row, whose pictures begin to be fetched, or why it is rejected.

    Raises:
        UserError: for a registered dataset type that fails.
    """
    try:
        found = transform.rows(_value(row), lambda value: escape(value, job.escaped_tokens))
        texts = [job.clip(_require_utf8(text)) for text in found]
    except RowError as error:
        return error
    except RecursionError:
        return TooDeep("a value is nested too deep to be read")
    except TypeFailed as error:
        raise UserError(f"row {row.index + 1} of {source}: {error}") from error
    if pictures is not None and not job.is_too_long(texts):
        pictures.read_ahead(texts[0].pictures)
    return texts


def _ahead(rows: Iterable[RawRow], compute: Callable[[RawRow], T], is_ahead: bool) -> Iterator[tuple[RawRow, T]]:
    """Yield each row with what is computed of it, which is done for a few rows ahead."""
    window = deque[tuple[RawRow, T]]()
    for row in rows:
        window.append((row, compute(row)))
        if len(window) > (AHEAD if is_ahead else 0):
            yield window.popleft()
    yield from window


def _rendered(row: RawRow, texts: list[Rendered], pictures: ShardPictures | None) -> _RenderedRow:
    """Prepare the pictures of a row. Raises as `ShardPictures.prepare`."""
    if pictures is None or not texts[0].pictures:
        return _RenderedRow(row, texts)
    prepared = pictures.prepare(texts[0].pictures)
    # Their bytes are in the store now, and those of a whole part may not fit into memory.
    return _RenderedRow(replace(row, value=without_data(row.value)), [replace(text, pictures=()) for text in texts], prepared)


def _require_utf8(text: Rendered) -> Rendered:
    """Return the text if it can be encoded as UTF-8; raise RowError for a lone surrogate, which JSON may contain escaped."""
    try:
        for part in (text.prompt, *text.sequences):
            part.encode()
        if text.reward_columns is not None:
            json.dumps(text.reward_columns, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RowError(f"the text is not valid Unicode: {error.reason}") from error
    return text


def _value(row: RawRow) -> dict[str, Any]:
    if row.value is None:
        raise RowError(row.fault)
    return row.value


def _add_rows(
    job: Job, part: Part, source: str, row: RawRow, prepared: list[tuple[Rendered, Tokenised]], images: tuple[str, ...]
) -> None:
    """Add the prepared rows of one raw row to the part: all or none of them, except those that are too long."""
    if not all(len(ids.prompt) for _, ids in prepared):
        part.reject(source, row, "the prompt has no tokens, so nothing predicts the first token of the answer")
        return
    if not all(len(completion) for _, ids in prepared for completion in ids.completions):
        part.reject(source, row, "an answer has no tokens of its own")
        return
    if any(job.is_control_id[completion].all() for _, ids in prepared for completion in ids.completions):
        part.reject(source, row, "an answer is nothing but control tokens")
        return
    if any(len(ids.completions) == 2 and np.array_equal(*ids.completions) for _, ids in prepared):
        part.reject(source, row, "chosen and rejected are the same tokens")
        return
    # Both halves of a split pair carry the row's notes, so the first one's are enough.
    row_notes = (*prepared[0][0].notes, *_control_notes(job, prepared), *_foreign_ends(job, prepared))
    notes = [replace(note, example=unescape(note.example)) for note in row_notes]
    part.notes.add(source, row.index + 1, notes)
    # A pair or its two halves are truncated together, since a cut may make the answers equal.
    all_truncated = truncate_all([ids for _, ids in prepared], job.sequence_len, job.excess_length_strategy)
    for half, ((text, ids), truncated) in enumerate(zip(prepared, all_truncated, strict=True)):
        if truncated is None and job.excess_length_strategy == "raise":
            raise UserError(
                f"excess_length_strategy: raise, and row {row.index + 1} of {source} has {ids.length} tokens, more than "
                f"sequence_len {job.sequence_len}; raise sequence_len, or set excess_length_strategy to drop or truncate"
            )
        part.too_long += truncated is None
        if truncated is not None:
            part.truncated += truncated is not ids
            # Stored without escapes, which only the tokenizer had to see.
            original = text if job.escaped_tokens is None else text.map_texts(unescape)
            # Counted whether its other half is kept or not: `row_id` follows from the index.
            part.kept.append(StagedRow(row.index + 1, row.index * len(prepared) + half, original, truncated, images))


def _control_notes(job: Job, prepared: list[tuple[Rendered, Tokenised]]) -> Iterator[Note]:
    """Yield a note of each control token inside a completion of plain text, before its end token."""
    for text, ids in prepared:
        for completion in () if text.templated else ids.completions:
            # The last token is the end, a control token in every answer.
            for token in dict.fromkeys(completion[:-1][job.is_control_id[completion[:-1]]].tolist()):
                yield Note("control_tokens", job.tokenizer.convert_ids_to_tokens(token), text.sequences[0][len(text.prompt) :])


def _foreign_ends(job: Job, prepared: list[tuple[Rendered, Tokenised]]) -> Iterator[Note]:
    """Yield a note of each completion that ends in another model's end token, which this tokenizer encodes as text."""
    for text, _ in prepared:
        # The renderer has reported these for the template already.
        reported = {note.detail for note in text.notes if note.kind == "end_is_text"}
        ends = [(job.foreign_end(sequence), sequence) for sequence in text.sequences]
        # Where both answers have the same, the template wrote it, not the rows.
        of_template = text.templated and len(ends) > 1 and all(end == ends[0][0] for end, _ in ends)
        for end, sequence in ends:
            if end is not None and end not in reported:
                kind = "end_is_text" if sequence.rstrip().endswith(end) else "text_in_end" if of_template else "foreign_end"
                yield Note(kind, end, sequence[-80:])


def _write_part(job: Job, shard: Shard, name: str, part: Part) -> dict[str, Any]:
    summary = {
        "part": name,
        "dataset": shard.dataset,
        "file": shard.file,
        "source": shard.located.name,
        "read": part.read,
        "end": part.end,
        "rows": len(part.kept),
        "conversational": sum(row.text.reward_columns is not None and row.text.templated for row in part.kept),
        "rejected": len(part.rejected),
        "too_long": part.too_long,
        "truncated": part.truncated,
        "notes": part.notes.entries(),
        "first_bad": [{key: row[key] for key in ("source", "row_number", "reason")} for row in part.rejected[:FIRST_BAD]],
    }
    return write_part(job.staging, summary, staged_table(job.kind, part.kept), part.rejected)
