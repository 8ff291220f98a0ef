"""What a config asks for: the inputs that name the scores, and the tasks that compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.fingerprint import digest
from pipeline.data.store import EVAL, TRAIN
from pipeline.reference.budget import part_tokens
from pipeline.reference.hashing import ids_digest
from pipeline.reference.identity import reference_identity
from pipeline.reference.parts import Task
from pipeline.reference.precision import Precision

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["FORMAT_VERSION", "Plan", "make_plan"]

FORMAT_VERSION = 2
"""Raised whenever the same inputs would give other bytes."""


@dataclass(frozen=True)
class Plan:
    """The scores that a config asks for. `inputs` is exactly what decides them, and nothing else.

    Not in it, since nothing of it changes a log-probability beyond rounding: how many actors there are, how rows share a
    forward, which attention kernel computes; nor anything of training.
    """

    prepared: Prepared
    precision: Precision
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest(self.inputs)

    @property
    def parts(self) -> dict[str, int]:
        """Part -> rows, train before eval: the files that will be there."""
        return {part["file"]: part["rows"] for part in self.inputs["parts"]}

    def tasks(self, part: str, rows: Sequence[int], rows_per_task: int, tokens_per_task: int) -> list[Task]:
        """Tasks of these rows of a part, in order: as many rows each as stay within both limits, and one at least."""
        sizes = part_tokens(self.prepared.path / part)
        cuts: list[list[int]] = []
        tokens = 0
        for row in rows:
            size = int(sizes[row])
            if not cuts or len(cuts[-1]) == rows_per_task or tokens + size > tokens_per_task:
                cuts.append([])
                tokens = 0
            cuts[-1].append(row)
            tokens += size
        return [_task(part, cut) for cut in cuts]


def _task(part: str, rows: list[int]) -> Task:
    start, stop = rows[0], rows[-1] + 1
    return Task(part, start, stop, () if len(rows) == stop - start else tuple(rows))


def make_plan(cfg: Any, prepared: Prepared, precision: Precision, splits: Sequence[str] = (TRAIN, EVAL)) -> Plan:
    """Read the ids of every prepared row of these splits and the reference's weights, as hashes.

    Raises:
        UserError: as `reference_identity`.
    """
    files: list[Path] = [file for split in splits for file in prepared.files(split)]
    rows = {entry["file"]: entry["rows"] for entry in prepared.manifest["files"]}
    names = [file.relative_to(prepared.path).as_posix() for file in files]
    inputs = {
        "format_version": FORMAT_VERSION,
        "reference": reference_identity(cfg),
        "precision": precision.as_inputs(),
        "parts": [{"file": name, "rows": rows[name], "ids": ids_digest(file)} for name, file in zip(names, files, strict=True)],
    }
    return Plan(prepared, precision, inputs)
