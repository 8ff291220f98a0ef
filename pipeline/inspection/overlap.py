"""8-grams of words that rows share with files of benchmarks, which a run shouldn't be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import RunConfig
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.sources.locate import EXTENSIONS, format_of
from pipeline.data.sources.readers import read_rows
from pipeline.data.sources.shards import survey
from pipeline.data.store import Prepared
from pipeline.data.transforms.control import control_pattern, strings_of
from pipeline.errors import UserError
from pipeline.inspection.columns import Entries, RowColumns, Runner, compute
from pipeline.inspection.parts import parts_of
from pipeline.io.digests import file_digest
from pipeline.io.storage import Folder
from pipeline.ray.tasks import Executor
from strategies.models.tokenizer import load_tokenizer

__all__ = ["Benchmark", "overlap_columns", "read_benchmark"]

WORDS = 8
"""Of an n-gram."""
WORD = re.compile(r"\w+")
PLAIN = (".txt", ".md")
"""Names of files that are one text; all others hold rows, in any format that `datasets:` takes."""
FACTORS = np.random.default_rng(8).integers(1, 2**63, WORDS, dtype=np.uint64) | np.uint64(1)
Grams = NDArray[np.uint64]


@dataclass(frozen=True)
class Benchmark:
    """The 8-grams of a benchmark's file."""

    path: str
    digest: str
    vocabulary: dict[str, int]
    """Word -> its number. A row's other words can be in none of the n-grams."""
    grams: Grams
    """Hashes, ascending."""

    def shared(self, text: str) -> tuple[int, int]:
        """Return how many 8-grams of a text the benchmark has too, and how many there are."""
        found = _grams([self.vocabulary.get(word, 0) for word in _words(text)])
        # Not `np.isin`, which would sort the benchmark's again for every text.
        positions = np.searchsorted(self.grams[:-1], found)
        return int((self.grams[positions] == found).sum()), len(found)


def read_benchmark(path: str) -> Benchmark:
    """Read a file: one text, or rows, of which every string counts.

    Raises:
        UserError: when it can't be read, or has no text of eight words.
    """
    vocabulary: dict[str, int] = {}
    parts = []
    try:
        # The same bytes are one text, or rows.
        digest = f"{file_digest(Path(path))}{'-text' * path.endswith(PLAIN)}"
        for text in _texts(path):
            # From 1: 0 stands for a word that the benchmark doesn't have.
            parts.append(_grams([vocabulary.setdefault(word, len(vocabulary) + 1) for word in _words(text)]))
    except UserError as error:
        raise UserError(f"--against: {path}: {str(error).removeprefix('path: ')}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"--against: {path!r} can't be read: {reason}; give files of text (.txt) or of rows") from error
    grams = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
    if not len(grams):
        raise UserError(f"--against: {path!r} has no text of {WORDS} words or more; give the benchmark's questions")
    return Benchmark(path, digest, vocabulary, grams)


def _texts(path: str) -> Iterator[str]:
    if path.endswith(PLAIN):
        yield Path(path).read_text(encoding="utf-8")
        return
    if format_of(path) is None:
        raise UserError(f"its name doesn't tell its format; give a file that ends in one of {', '.join((*PLAIN, *EXTENSIONS))}")
    for shard in survey({"path": path}, 0, 2000).shards:
        for row in read_rows(shard):
            if row.value is None:
                raise UserError(f"row {row.index + 1}: {row.fault}")
            yield from strings_of(row.value)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _grams(words: Sequence[int]) -> Grams:
    """Hash the n-grams of numbered words, without those with a word 0."""
    numbers = np.array(words, np.uint64)
    if len(numbers) < WORDS:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, WORDS)
    hashes = (windows * FACTORS).sum(axis=1, dtype=np.uint64)
    hashes = hashes ^ (hashes >> np.uint64(29))
    # An n-gram with another word can't be shared, but counts.
    hashes[(windows == 0).any(axis=1)] = 0
    return hashes


@dataclass(frozen=True)
class OverlapJob:
    """Arguments of `overlap_part`."""

    prepared: Prepared
    benchmarks: tuple[Benchmark, ...]
    messages: re.Pattern[str] | None
    """The control tokens, between which messages stand; None for a tokenizer without."""
    folder: Folder
    parts: tuple[str, ...]


def overlap_part(job: OverlapJob, index: int) -> Iterator[dict[str, Any]]:
    """Write the share of 8-grams that a benchmark has too, of each row's message that has the most. Raises OSError."""
    import pyarrow as pa

    part = job.parts[index]
    names = ["prompt", *COMPLETIONS[job.prepared.manifest["kind"]]]
    rows = job.prepared.read_part(part, ["row_id", *names])
    shares = np.zeros(len(rows), np.float32)
    # By message: beside a system prompt, a question would be a small part of its prompt's 8-grams.
    texts = [_messages([row[name] or "" for name in names], job.messages) for row in rows.select(names).to_pylist()]
    for benchmark in job.benchmarks:
        shares = np.maximum(shares, [_share(benchmark, row) for row in texts])
    table = pa.table({"row_id": rows["row_id"], "benchmark_overlap": shares.astype(np.float32)})
    yield {"part": part, **job.folder.write_table(part, table)}


def _messages(texts: Sequence[str], pattern: re.Pattern[str] | None) -> list[str]:
    return [message for text in texts for message in (pattern.split(text) if pattern is not None else [text])]


def _share(benchmark: Benchmark, texts: Sequence[str]) -> float:
    """Return the share of the text that has the most."""
    counts = map(benchmark.shared, texts)
    return max(shared / max(total, 1) for shared, total in counts)


def overlap_columns(
    cfg: RunConfig, prepared: Prepared, benchmarks: Sequence[Benchmark], executor: Executor | None = None
) -> RowColumns:
    """Compute or open the column `benchmark_overlap` of a store and some benchmarks.

    Raises:
        UserError: when it can't be written, or the tokenizer can't be loaded.
    """
    parts, messages = parts_of(prepared), control_pattern(load_tokenizer(cfg))

    def write(folder: Folder, run: Runner) -> Entries:
        return run(overlap_part, OverlapJob(prepared, tuple(benchmarks), messages, folder, tuple(parts)))

    inputs = {"group": "overlap", "benchmarks": sorted(benchmark.digest for benchmark in benchmarks)}
    return compute(cfg, prepared, inputs, write, executor)
