"""Plan of the scores of a config: the inputs of their fingerprint, and the tasks that compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.data.fingerprint import digest
from pipeline.data.store import EVAL, TRAIN
from pipeline.reference.fingerprint import reference_identity
from pipeline.reference.hashing import ids_digests
from pipeline.reference.precision import Precision
from pipeline.reference.score_files import Task
from pipeline.reference.token_budget import part_tokens

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["FORMAT_VERSION", "Plan", "make_plan"]

FORMAT_VERSION = 2
"""Incremented whenever the same inputs would give other bytes."""


@dataclass(frozen=True)
class Plan:
    """Scores of a config. `inputs` holds exactly what determines them.

    Excluded, since they change log-probabilities by rounding at most: the number of actors, how rows share a forward, the
    attention kernel; and everything about training.
    """

    prepared: Prepared
    precision: Precision
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest(self.inputs)

    @property
    def parts(self) -> dict[str, int]:
        """Part -> number of rows, train before eval: the files of the complete scores."""
        return {part["file"]: part["rows"] for part in self.inputs["parts"]}

    def tasks(self, part: str, rows: Sequence[int], rows_per_task: int, tokens_per_task: int) -> list[Task]:
        """Split rows of a part into tasks, in order: each has as many rows as both limits allow, and at least one."""
        sizes = part_tokens(self.prepared, part)
        cuts: list[list[int]] = []
        tokens = 0
        for row in rows:
            size = int(sizes[row])
            # A row above the token limit still gets a task, of its own.
            if not cuts or len(cuts[-1]) == rows_per_task or tokens + size > tokens_per_task:
                cuts.append([])
                tokens = 0
            cuts[-1].append(row)
            tokens += size
        return [Task.of(part, cut) for cut in cuts]


def make_plan(
    cfg: RunConfig,
    prepared: Prepared,
    precision: Precision,
    splits: Sequence[str] = (TRAIN, EVAL),
    pictures: dict[str, Any] | None = None,
) -> Plan:
    """Hash the token ids of these splits and the reference's weights into a plan.

    Args:
        pictures: what decides the pixels of pictures; None where no row has any.

    Raises:
        UserError: as `reference_identity`.
    """
    names = [part for split in splits for part in prepared.parts(split)]
    rows = {entry["file"]: entry["rows"] for entry in prepared.manifest["files"]}
    inputs = {
        "format_version": FORMAT_VERSION,
        "reference": reference_identity(cfg),
        "precision": precision.as_inputs(),
        **({"pictures": pictures} if pictures is not None else {}),
        # Absent by default, so that the key left the fingerprints of existing scores unchanged.
        **({"hidden_states": True} if cfg.ray.score.hidden_states else {}),
        # Ids instead of the store's fingerprint: data that differ only in text have the same scores.
        "parts": [
            {"file": name, "rows": rows[name], "ids": ids}
            for name, ids in zip(names, ids_digests(prepared, names), strict=True)
        ],
    }
    return Plan(prepared, precision, inputs)
