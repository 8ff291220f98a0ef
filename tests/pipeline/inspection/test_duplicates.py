"""Near duplicates in generated rows, of which it is known which are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyarrow as pa

from pipeline.inspection.duplicates import near_duplicates
from pipeline.inspection.shingles import BANDS, band_hashes, jaccard, row_shingles, shared_openings

NAMES = ["prompt_ids", "chosen_ids", "rejected_ids"]
LENGTHS = (60, 100, 110)
HEADER, TAIL = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]
"""What a template writes around every prompt."""


def rows_of(texts: list[list[np.ndarray]]) -> pa.Table:
    columns = {name: [row[index].tolist() for row in texts] for index, name in enumerate(NAMES)}
    columns["prompt_ids"] = [[*HEADER, *prompt, *TAIL] for prompt in columns["prompt_ids"]]
    return pa.table({"source": ["one"] * len(texts), **columns})


def groups_of(rows: pa.Table) -> list[int]:
    openings = shared_openings({"one": rows["prompt_ids"].to_pylist()})
    assert openings == {"one": (HEADER, TAIL)}
    shingles = row_shingles(rows, NAMES, openings)
    bands = band_hashes(shingles)
    wanted = {row: np.unique(hashes) for row, hashes in enumerate(shingles)}
    return near_duplicates(len(rows), (bands[:, band] for band in range(BANDS)), lambda _: wanted).tolist()


def changed(text: list[np.ndarray], tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The row with some of its tokens replaced, evenly: each takes five shingles."""
    flat = np.concatenate(text)
    places = np.linspace(3, len(flat) - 4, tokens).astype(int)
    flat[places] = rng.integers(20_000, 30_000, tokens)
    return np.split(flat, np.cumsum([len(part) for part in text])[:-1])


def test_rows_that_are_alike_by_four_fifths_are_found_and_no_others() -> None:
    rng = np.random.default_rng(0)
    # Tokens as frequent as words are, so that unrelated rows share some.
    texts = [[11 + rng.zipf(1.3, length) % 5000 for length in LENGTHS] for _ in range(1500)]
    similar = [changed(texts[row], 6 + row % 2, rng) for row in range(200)]
    less_similar = [changed(texts[row], 16, rng) for row in range(200, 400)]
    rows = rows_of([*texts, *similar, *less_similar])
    planted = {(row, 1500 + row) for row in range(200)}
    sets = [np.unique(hashes) for hashes in row_shingles(rows, NAMES, shared_openings({"one": rows["prompt_ids"].to_pylist()}))]
    assert 0.78 < np.mean([jaccard(sets[one], sets[other]) for one, other in planted]) < 0.82
    assert max(jaccard(sets[row], sets[1500 + row]) for row in range(200, 400)) < 0.65

    groups: dict[int, list[int]] = {}
    for row, first in enumerate(groups_of(rows)):
        groups.setdefault(first, []).append(row)
    found = {pair for group in groups.values() for pair in combinations(group, 2)}
    recall, precision = len(found & planted) / len(planted), len(found & planted) / len(found)
    print(f"recall {recall:.3f}, precision {precision:.3f}")
    assert recall >= 0.9 and precision >= 0.95


def test_equal_rows_are_one_group_and_short_ones_are_compared_whole() -> None:
    rng = np.random.default_rng(1)
    own = [[rng.integers(11, 5000, 3) for _ in NAMES] for _ in range(40)]
    groups = groups_of(rows_of([*own, *[own[0]] * 30, own[1]]))
    assert groups[40:] == [0] * 30 + [1]
    assert groups[:40] == [*range(40)]
