"""Row ids of every optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["Ledger", "RowId"]

RowId: TypeAlias = str | int
"""A row's `row_id`; its index in the data set if it has none."""


class Ledger(TrainerCallback, ExportableState):
    """Records the rows that this rank trained on, per step; the ledgers of all ranks add up to the global batch.

    A checkpoint stores the numbers of the skipped steps; the rows of a step follow from `strategies.batch.plan`.

    Attributes:
        steps: a record per step, `{"step": 7, "row_ids": [...]}`, with `"skipped": True` if the step was skipped.
        skipped: numbers of the steps skipped since the start of the run.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.skipped: list[int] = []
        self._row_ids: list[Any] | None = None
        self._skips = False

    def feed(self, row_ids: Iterable[RowId]) -> None:
        """Set the rows of the current step."""
        self._row_ids = list(row_ids)

    def skip(self) -> None:
        """Mark the current step as skipped."""
        self._skips = True

    def take(self) -> list[dict[str, Any]]:
        """Return the records since the last call, and drop them."""
        steps, self.steps = self.steps, []
        return steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the state of a checkpoint, and drop the records of steps after it, which will be repeated."""
        self.steps = [record for record in self.steps if record["step"] <= state.global_step]
        # transformers restores callbacks only with `restore_callback_states_from_checkpoint`, and replaces the objects, while
        # `trainer.ledger` stays. At step 0 the entry is this object's own state, of an earlier call of `train`.
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.skipped = list(saved["attributes"]["skipped"]) if saved else []
        self._row_ids, self._skips = None, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the record of the step."""
        if self._skips:
            self.skipped.append(state.global_step)
        # Only the trainers of pairs feed rows; the others count skipped steps alone.
        if self._row_ids is not None:
            marks = {"skipped": True} if self._skips else {}
            self.steps.append({"step": state.global_step, "row_ids": sorted(self._row_ids, key=_order), **marks})
        self._row_ids, self._skips = None, False

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"args": {}, "attributes": {"skipped": self.skipped}}


def _order(row_id: RowId) -> tuple[bool, RowId]:
    """Sort indices before names: a step may have both."""
    return isinstance(row_id, str), row_id
