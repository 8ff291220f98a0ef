"""Splitting of sources into shards, which depends on the data alone, never on the number of CPUs."""

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
    """Rows `[start, stop)` of one file, counted from 0; `stop` is None when the number of rows is unknown.

    `offset` is the position where reading begins: a byte for JSON lines, a row group for Parquet. `begins_at` is the index of
    the row at that position: `start`, or less when a slice starts within the shard.
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
    """One entry of `datasets:`: the identity of its content, and its shards in order. `rows` is None when unknown."""

    identity: tuple[str, ...]
    shards: tuple[Shard, ...]
    rows: int | None


def survey(dataset: Mapping[str, Any], index: int, rows_per_part: int) -> Source:
    """Find the files of a dataset, hash them, and split them into shards of about `rows_per_part` rows.

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
            # Of the whole file; a slice is applied to its shards below, so the identity doesn't depend on it.
            identity, file_shards = _survey_file(Shard(index, number, sniff(file), 0, None), rows_per_part)
        except UserError:
            raise
        except NETWORK_ERRORS as error:
            raise UserError(f"path: cannot read {file.name!r} as {file.format}: {error}") from error
        identities.append(identity)
        shards += [cut for shard in file_shards if (cut := _clip(shard, start, stop)) is not None]
    counts = [None if shard.stop is None else shard.stop - shard.start for shard in shards]
    sizes = [count for count in counts if count is not None]
    return Source(tuple(identities), tuple(shards), sum(sizes) if len(sizes) == len(counts) else None)


def _window(dataset: Mapping[str, Any], files: int) -> tuple[int, int | None]:
    """Return the (start, stop) of the slice in `split`; `locate` has checked the split's name."""
    split = dataset.get("split") or "train"
    match = SLICE.fullmatch(split)
    if match is None:
        raise UserError(f"split: got {split!r}; files take 'train' or a slice of rows such as 'train[:1000]'")
    if not (match["start"] or match["stop"]):
        return 0, None
    # Row numbers of a slice would have to count over all files, and most formats don't give their counts before.
    if files > 1:
        raise UserError(f"split: got {split!r}; a slice works on one file, and this dataset has {files}")
    return int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def _clip(shard: Shard, start: int, stop: int | None) -> Shard | None:
    first = max(shard.start, start)
    last = shard.stop if stop is None else stop if shard.stop is None else min(shard.stop, stop)
    # `begins_at` and `offset` stay: reading still starts there, and skips rows before `start`.
    return None if last is not None and first >= last else replace(shard, start=first, stop=last)


def _survey_file(whole: Shard, rows_per_part: int) -> tuple[str, list[Shard]]:
    file = whole.located
    if is_uri(file.location):
        identity = content_identity(file.location)
    else:
        # One pass over the file for both: the hash has to read it all anyway.
        identity, offsets, lines = _hash_and_index(file, rows_per_part)
        if file.format == "jsonl" and not file.is_packed:
            return identity, _split_rows(whole, lines, rows_per_part, offsets)
    # Row groups, and batches of local Arrow files, can be read by themselves; any other file is one shard.
    if file.format == "parquet" and not file.is_packed:
        return identity, _row_groups(whole, rows_per_part)
    if file.format == "arrow" and not file.is_packed and not is_uri(file.location):
        return identity, _split_rows(whole, _arrow_rows(file), rows_per_part)
    return identity, [whole]


def _hash_and_index(file: Located, rows_per_part: int) -> tuple[str, list[int], int]:
    """Return a file's SHA-256 and, for JSON lines, the offset of every `rows_per_part`-th line and the number of lines."""
    digest, offsets, position, lines = hashlib.sha256(), [], 0, 0
    with open(file.location, "rb") as stream:
        if file.format != "jsonl" or file.is_packed:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
            return digest.hexdigest(), [0], 0
        for lines, line in enumerate(stream, 1):
            # Lines count from 1 here; modulo 1 is always 0.
            if lines % rows_per_part == 1 or rows_per_part == 1:
                offsets.append(position)
            digest.update(line)
            position += len(line)
    return digest.hexdigest(), offsets, lines


def _split_rows(whole: Shard, rows: int, rows_per_part: int, offsets: list[int] | None = None) -> list[Shard]:
    starts = range(0, rows, rows_per_part)
    return [
        replace(
            whole,
            start=start,
            begins_at=start,
            stop=min(start + rows_per_part, rows),
            offset=offsets[start // rows_per_part] if offsets else 0,
        )
        for start in starts
    ]


def _row_groups(whole: Shard, rows_per_part: int) -> list[Shard]:
    """Split by whole row groups, at least `rows_per_part` rows each, since a group can only be read from its start."""
    with open_seekable(whole.located.location) as source:
        metadata = pq.ParquetFile(source).metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    shards, begin, group_of_begin, row = [], 0, 0, 0
    for group, size in enumerate(sizes):
        row += size
        # `begins_at` is the first row of `offset`'s group, from which `_window` counts.
        if row - begin >= rows_per_part or group == len(sizes) - 1:
            shards.append(replace(whole, start=begin, begins_at=begin, stop=row, offset=group_of_begin))
            begin, group_of_begin = row, group + 1
    return shards


def _arrow_rows(file: Located) -> int:
    with pa.memory_map(file.location) as source:
        return sum(batch.num_rows for batch in arrow_batches(source))


def _survey_hub(dataset: Mapping[str, Any], index: int, rows_per_part: int) -> Source:
    keys = hub.hub_keys(dataset)
    identity, rows = hub.survey(keys)
    located = Located(dataset["path"], f"{dataset['path']}/{dict(keys)['split']}", "hub")
    return Source((identity,), tuple(_split_rows(Shard(index, 0, located, 0, None, hub_keys=keys), rows, rows_per_part)), rows)
