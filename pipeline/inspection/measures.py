"""Columns of each row by itself: lengths, and what the reference's scores say of a pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import Prepared
from pipeline.inspection.parts import list_values
from pipeline.io.storage import Folder
from pipeline.reference.score_files import HIDDEN, LOGPS

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.reference import Scores

__all__ = ["MeasureJob", "ches", "measure_part"]

Values = NDArray[np.float64]


@dataclass(frozen=True)
class MeasureJob:
    """Arguments of `measure_part`."""

    prepared: Prepared
    scores: Scores | None
    folder: Folder
    parts: tuple[str, ...]


def measure_part(job: MeasureJob, index: int) -> Iterator[dict[str, Any]]:
    """Compute and write the columns of one part; yields its name. Raises OSError."""
    import pyarrow as pa

    part = job.parts[index]
    names = ["prompt", *COMPLETIONS[job.prepared.manifest["kind"]]]
    rows = job.prepared.read_part(part, ["row_id", *(f"{name}_length" for name in names)])
    columns: dict[str, Any] = {name: rows[name].to_numpy() for name in rows.column_names}
    if "rejected" in names:
        # An empty answer has no tokens to divide by.
        columns["length_ratio"] = columns["chosen_length"] / np.maximum(columns["rejected_length"], 1)
        if job.scores is not None:
            columns |= _of_scores(job.scores, part)
    table = pa.table(columns)
    single = [name for name in table.column_names if table[name].type == pa.float64()]
    for name in single:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.float32()))
    yield {"part": part, **job.folder.write_table(part, table)}


def _of_scores(scores: Scores, part: str) -> dict[str, Values]:
    names = [*LOGPS, *(HIDDEN if scores.has_hidden_states else ())]
    table = scores.read_part(part, names)
    (chosen, chosen_tokens), (rejected, rejected_tokens) = (_sums(table[name]) for name in LOGPS)
    columns = {
        "reference_chosen": chosen,
        "reference_rejected": rejected,
        "reference_margin": chosen - rejected,
        "score_gap": chosen / np.maximum(chosen_tokens, 1) - rejected / np.maximum(rejected_tokens, 1),
    }
    if scores.has_hidden_states:
        columns["ches"] = ches(*(_states(table[name]) for name in HIDDEN))
    return columns


def _sums(column: pa.ChunkedArray) -> tuple[Values, NDArray[np.int64]]:
    """Return the sum and the number of each row's values, shapes (rows,)."""
    values, offsets = list_values(column)
    # Differences of running sums, in float64: `np.add.reduceat` would give an element, not 0, for an empty answer.
    running = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return running[offsets[1:]] - running[offsets[:-1]], np.diff(offsets)


def _states(column: pa.ChunkedArray) -> Values:
    values, offsets = list_values(column)
    return values.astype(np.float64).reshape(len(offsets) - 1, -1) if len(offsets) > 1 else np.zeros((0, 1))


def ches(chosen: Values, rejected: Values) -> Values:
    """Return the length-normalized CHES score of pairs, shape (rows,) (arXiv 2410.08847).

    The inner product of the answers' mean hidden states, less the squared norm of the chosen one's: where it is high, raising
    the chosen answer over the rejected one pushes the probability of both down.

    Args:
        chosen: mean hidden states over the positions that predict the answer's tokens, shape (rows, hidden size).
        rejected: as `chosen`.
    """
    return (chosen * rejected).sum(axis=1) - (chosen * chosen).sum(axis=1)
