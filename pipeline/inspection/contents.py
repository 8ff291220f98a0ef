"""Columns of rows among all rows: repeated prompts, near duplicates, missing ends, first tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.pictures import IMAGES
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import TRAIN, Prepared
from pipeline.inspection.duplicates import near_duplicates
from pipeline.inspection.parts import list_values
from pipeline.inspection.shingles import BANDS, Openings, band_hashes, row_shingles, shared_openings
from pipeline.io.storage import Folder

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ContentJob", "sample_openings", "sketch_part", "write_contents"]

SAMPLED_PARTS, SAMPLED_ROWS = 8, 250
"""From which the openings of prompts are found."""
TRAILING = 4
"""Most tokens of white space after the end of an answer."""
BAND_COLUMNS = [f"band_{band:02d}" for band in range(BANDS)]
Array = NDArray[Any]


@dataclass(frozen=True)
class ContentJob:
    """Arguments of `sketch_part`."""

    prepared: Prepared
    openings: Openings
    end_ids: tuple[int, ...]
    """Tokens that end an answer."""
    blank_ids: tuple[int, ...]
    """Tokens of white space, which templates such as ChatML write after the end."""
    staging: Folder
    parts: dict[str, int]
    """Part -> number of rows."""

    @property
    def answers(self) -> list[str]:
        """Columns of the answers' token ids."""
        return [f"{name}_ids" for name in COMPLETIONS[self.prepared.manifest["kind"]]]

    @property
    def pictures(self) -> list[str]:
        """The column of names of pictures, where any row has one: all pictures of one size have the same token ids."""
        return [IMAGES] if self.prepared.manifest.get("pictures") else []


def sample_openings(prepared: Prepared, parts: Mapping[str, int]) -> Openings:
    """Find what the prompts of each source begin and end with, from rows of some parts."""
    prompts: dict[str, list[list[int]]] = {}
    names = list(parts)
    for part in names[:: max(1, len(names) // SAMPLED_PARTS)]:
        rows = prepared.read_part(part, ["source", "prompt_ids"])
        for row in rows.take([*range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS))]).to_pylist():
            prompts.setdefault(row["source"], []).append(row["prompt_ids"])
    return shared_openings(prompts)


def sketch_part(job: ContentJob, index: int) -> Iterator[dict[str, Any]]:
    """Write what the columns of one part are computed from; yields the part's name. Raises OSError."""
    import pyarrow as pa

    part = list(job.parts)[index]
    names = ["prompt_ids", *job.answers]
    rows = job.prepared.read_part(part, ["row_id", "source", *names, *job.pictures])
    pictures = _picture_hashes(rows)
    prompts = _hashes(*list_values(rows["prompt_ids"])) ^ pictures
    columns: dict[str, Any] = {"row_id": rows["row_id"], "prompt": prompts}
    lacking = np.zeros(len(rows), np.int8)
    for name in job.answers:
        values, offsets = list_values(rows[name])
        columns[f"first_{name}"] = _at(values, offsets, offsets[:-1])
        lacking += ~np.isin(_last(values, offsets, job.blank_ids), job.end_ids)
    columns["answers_without_end"] = lacking
    bands = band_hashes(_with_pictures(row_shingles(rows, names, job.openings), pictures))
    columns |= {name: bands[:, band] for band, name in enumerate(BAND_COLUMNS)}
    yield {"part": part, **job.staging.write_table(part, pa.table(columns))}


def _hashes(values: Array, offsets: Array) -> NDArray[np.uint64]:
    import hashlib

    data = values.astype("<i4").tobytes()
    spans = zip((4 * offsets[:-1]).tolist(), (4 * offsets[1:]).tolist(), strict=True)
    digests = b"".join(hashlib.blake2b(data[start:end], digest_size=8).digest() for start, end in spans)
    return np.frombuffer(digests, np.uint64)


def _picture_hashes(rows: pa.Table) -> NDArray[np.uint64]:
    """Hash the names of each row's pictures, which their bytes decide; 0 of a row without, shape (rows,)."""
    import hashlib

    hashes = np.zeros(len(rows), np.uint64)
    if IMAGES in rows.column_names:
        for index, names in enumerate(rows[IMAGES].to_pylist()):
            if names:
                digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
                hashes[index] = int.from_bytes(digest, "little")
    return hashes


def _with_pictures(shingles: list[NDArray[np.uint32]], pictures: NDArray[np.uint64]) -> list[NDArray[np.uint32]]:
    """Mix the pictures of each row into its shingles: the same question about another picture is another row."""
    mixed = (pictures & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return [hashes ^ picture for hashes, picture in zip(shingles, mixed, strict=True)]


def _at(values: Array, offsets: Array, positions: Array) -> NDArray[np.int32]:
    """Return the token at a position of each row's list; -1 where the list is empty."""
    empty = offsets[1:] == offsets[:-1]
    tokens = np.full(len(empty), -1, np.int32)
    tokens[~empty] = values[positions[~empty]]
    return tokens


def _last(values: Array, offsets: Array, blank_ids: Sequence[int]) -> NDArray[np.int32]:
    """Return the last token of each row's list that is no white space, of its last `TRAILING`; -1 where the list is empty."""
    positions = offsets[1:] - 1
    for _ in range(TRAILING):
        is_blank = np.isin(_at(values, offsets, positions), blank_ids)
        positions = np.where(is_blank, np.maximum(positions - 1, offsets[:-1]), positions)
    return _at(values, offsets, positions)


def write_contents(job: ContentJob, folder: Folder) -> dict[str, dict[str, Any]]:
    """Compute the columns of all parts from what `sketch_part` wrote, and write them to `folder`; returns manifest entries.

    Raises:
        OSError: when they can't be written.
    """
    import pyarrow as pa

    row_ids = _column(job, "row_id")
    _, prompts, number = np.unique(_column(job, "prompt"), return_inverse=True, return_counts=True)
    firsts = [_column(job, f"first_{name}") for name in job.answers]
    _, which, counts = np.unique(np.concatenate(firsts), return_inverse=True, return_counts=True)
    shares = (counts / counts.sum())[which].reshape(len(firsts), -1).min(axis=0)
    group = near_duplicates(len(row_ids), (_column(job, name) for name in BAND_COLUMNS), lambda rows: _shingles(job, rows))
    sizes = np.bincount(group, minlength=len(group))[group]
    table = pa.table(
        {
            "row_id": row_ids,
            "prompt_rows": number[prompts].astype(np.int32),
            "prompt_in_both": _in_both(job, prompts),
            "near_duplicates": (sizes - 1).astype(np.int32),
            "duplicate_of": pa.array(row_ids[group], mask=group == np.arange(len(group))),
            "answers_without_end": _column(job, "answers_without_end"),
            "first_token_share": shares.astype(np.float32),
            **{f"{name.removesuffix('_ids')}_first_token": tokens for name, tokens in zip(job.answers, firsts, strict=True)},
        }
    )
    start, entries = 0, {}
    for part, rows in job.parts.items():
        entries[part] = folder.write_table(part, table.slice(start, rows))
        start += rows
    return entries


def _in_both(job: ContentJob, prompts: Array) -> NDArray[np.bool_]:
    """Return whether rows of both splits have the row's prompt, given the number of each row's prompt."""
    trained = np.repeat([part.startswith(f"{TRAIN}/") for part in job.parts], list(job.parts.values()))
    return np.isin(prompts, np.intersect1d(prompts[trained], prompts[~trained]))


def _column(job: ContentJob, name: str) -> Array:
    """Read one column of all parts: of all at once, the bands of a hundred million rows would be 16 GB."""
    return np.concatenate([job.staging.read_table(part, [name])[name].to_numpy() for part in job.parts])


def _shingles(job: ContentJob, rows: NDArray[np.int64]) -> dict[int, NDArray[np.uint32]]:
    """Read the shingles of rows, by their index over all parts, without repetitions."""
    found: dict[int, NDArray[np.uint32]] = {}
    names, start = ["prompt_ids", *job.answers], 0
    for part, number in job.parts.items():
        here = rows[(rows >= start) & (rows < start + number)]
        if len(here):
            table: pa.Table = job.prepared.read_part(part, ["source", *names, *job.pictures]).take(here - start)
            shingles = _with_pictures(row_shingles(table, names, job.openings), _picture_hashes(table))
            found |= dict(zip(here.tolist(), map(np.unique, shingles), strict=True))
        start += number
    return found
