"""Cuts sources into shards. The cut depends on the data alone, never on how many CPUs there are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources import hub
from pipeline.data.sources.arrow import arrow_batches
from pipeline.data.sources.filesystem import CHUNK, NETWORK_ERRORS, content_identity, is_uri, open_seekable
from pipeline.data.sources.locate import Located, locate
from pipeline.data.sources.sniff import sniff
from pipeline.errors import UserError

__all__ = ["Shard", "Source", "survey"]

SLICE = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclass(frozen=True)
class Shard:
    """Rows `[start, stop)` of one file, counted from 0; `stop` is None where only reading to the end tells.

    `offset` is where reading begins: a byte for JSON lines, a row group for Parquet. `begins_at` is the row that stands
    there, `start` itself unless a slice begins after it.
    """

    dataset: int
    file: int
    located: Located
    start: int
    stop: int | None
    offset: int = 0
    begins_at: int = 0
    hub_keys: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Source:
    """One entry of `datasets:`: what stands for its content, and its shards in order."""

    identity: tuple[str, ...]
    shards: tuple[Shard, ...]
    rows: int | None


def survey(dataset: Mapping[str, Any], index: int, rows_per_part: int) -> Source:
    """Find the files of a dataset, hash them, and cut them into shards of about `rows_per_part` rows.

    Raises:
        UserError: as `locate`; and for a file that cannot be read, or a split that local files don't have.
    """
    located = locate(dataset)
    if located is None:
        return _survey_hub(dataset, index, rows_per_part)
    start, stop = _window(dataset, len(located))
    identities, shards = [], []
    for number, file in enumerate(located):
        try:
            identity, found = _survey_file(Shard(index, number, sniff(file), 0, None), rows_per_part)
        except UserError:
            raise
        except NETWORK_ERRORS as error:
            raise UserError(f"path: cannot read {file.name!r} as {file.format}: {error}") from error
        identities.append(identity)
        shards += [cut for shard in found if (cut := _clip(shard, start, stop)) is not None]
    counts = [None if shard.stop is None else shard.stop - shard.start for shard in shards]
    known = [count for count in counts if count is not None]
    return Source(tuple(identities), tuple(shards), sum(known) if len(known) == len(counts) else None)


def _window(dataset: Mapping[str, Any], files: int) -> tuple[int, int | None]:
    """The rows that `split` asks for; whether there is a split of that name, `locate` has checked."""
    split = dataset.get("split") or "train"
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(f"split: got {split!r}; files take 'train' or a slice of rows such as 'train[:1000]'")
    if not (match["start"] or match["stop"]):
        return 0, None
    if files > 1:
        raise UserError(f"split: got {split!r}; a slice works on one file, and this dataset has {files}")
    return int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _clip(shard: Shard, start: int, stop: int | None) -> Shard | None:
    first = max(shard.start, start)
    last = shard.stop if stop is None else stop if shard.stop is None else min(shard.stop, stop)
    return None if last is not None and first >= last else replace(shard, start=first, stop=last)


def _survey_file(whole: Shard, rows_per_part: int) -> tuple[str, list[Shard]]:
    file = whole.located
    if is_uri(file.where):
        identity = content_identity(file.where)
    else:
        identity, marks, lines = _read_through(file, rows_per_part)
        if file.format == "jsonl" and not file.is_packed:
            return identity, _runs(whole, lines, rows_per_part, marks)
    if file.format == "parquet" and not file.is_packed:
        return identity, _row_groups(whole, rows_per_part)
    if file.format == "arrow" and not file.is_packed and not is_uri(file.where):
        return identity, _runs(whole, _arrow_rows(file), rows_per_part)
    return identity, [whole]


def _read_through(file: Located, rows_per_part: int) -> tuple[str, list[int], int]:
    """SHA-256 of a local file and, of the same pass, the byte where every `rows_per_part`-th line begins."""
    digest, marks, position, lines = hashlib.sha256(), [], 0, 0
    with open(file.where, "rb") as stream:
        if file.format != "jsonl" or file.is_packed:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
            return digest.hexdigest(), [0], 0
        for lines, line in enumerate(stream, 1):
            if lines % rows_per_part == 1 or rows_per_part == 1:
                marks.append(position)
            digest.update(line)
            position += len(line)
    return digest.hexdigest(), marks, lines


def _runs(whole: Shard, rows: int, rows_per_part: int, marks: list[int] | None = None) -> list[Shard]:
    starts = range(0, rows, rows_per_part)
    return [
        replace(
            whole,
            start=start,
            begins_at=start,
            stop=min(start + rows_per_part, rows),
            offset=marks[start // rows_per_part] if marks else 0,
        )
        for start in starts
    ]


def _row_groups(whole: Shard, rows_per_part: int) -> list[Shard]:
    """Runs of whole row groups with `rows_per_part` rows at least, since a group can only be read from its start."""
    with open_seekable(whole.located.where) as source:
        metadata = pq.ParquetFile(source).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    shards, begin, group_of_begin, row = [], 0, 0, 0
    for group, size in enumerate(sizes):
        row += size
        if row - begin >= rows_per_part or group == len(sizes) - 1:
            shards.append(replace(whole, start=begin, begins_at=begin, stop=row, offset=group_of_begin))
            begin, group_of_begin = row, group + 1
    return shards


def _arrow_rows(file: Located) -> int:
    with pa.memory_map(file.where) as source:
        return sum(batch.num_rows for batch in arrow_batches(source))


def _survey_hub(dataset: Mapping[str, Any], index: int, rows_per_part: int) -> Source:
    keys = hub.hub_keys(dataset)
    identity, rows = hub.survey(keys)
    located = Located(dataset["path"], f"{dataset['path']}/{dict(keys)['split']}", "hub")
    return Source((identity,), tuple(_runs(Shard(index, 0, located, 0, None, hub_keys=keys), rows, rows_per_part)), rows)
