"""Which rows every optimizer step was taken on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

__all__ = ["Ledger", "RowId"]

RowId: TypeAlias = str | int
"""A row's `row_id`; its number in the data set where it brings none."""


class Ledger(TrainerCallback, ExportableState):
    """Writes down, step by step, the rows that this rank has trained on. All ranks together have those of the global batch.

    A checkpoint carries the numbers of the skipped steps; which rows a step has had follows from `strategies.batching`.

    Attributes:
        steps: a record of each step, `{"step": 7, "row_ids": [...]}`, with `"skipped": True` where the step was left out.
        skipped: numbers of the steps that were left out since the run began.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.skipped: list[int] = []
        self._fed: list[Any] | None = None
        self._skips = False

    def feed(self, row_ids: Iterable[RowId]) -> None:
        """The rows of the step at hand."""
        self._fed = list(row_ids)

    def skip(self) -> None:
        """The step at hand is left out."""
        self._skips = True

    def take(self) -> list[dict[str, Any]]:
        """Return the records since the last call; they are not kept."""
        steps, self.steps = self.steps, []
        return steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on where a checkpoint was written; steps after it are about to be repeated."""
        self.steps = [record for record in self.steps if record["step"] <= state.global_step]
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self.skipped = list(saved["attributes"]["skipped"]) if saved else []
        self._fed, self._skips = None, False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the record of the step."""
        if self._skips:
            self.skipped.append(state.global_step)
        if self._fed is not None:
            marks = {"skipped": True} if self._skips else {}
            self.steps.append({"step": state.global_step, "row_ids": sorted(self._fed, key=_order), **marks})
        self._fed, self._skips = None, False

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"skipped": self.skipped}}


def _order(row_id: RowId) -> tuple[bool, RowId]:
    """Numbers before names: a step may have both."""
    return isinstance(row_id, str), row_id
