"""`metrics.jsonl`: one record per logging or evaluation step, each step once."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import Location
from pipeline.training.lines import open_lines

if TYPE_CHECKING:
    import pandas

__all__ = ["MetricsFile", "identity"]


class MetricsFile:
    """Appends records, each once; when a run restarts from a checkpoint, drops those that are about to be repeated.

    Records that can't be written now, since the disk is full or storage fails, wait for the next call, so that a run
    doesn't fail for its log.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self._lines = open_lines(path)
        self._waiting: list[dict[str, Any]] = []
        self._cut: int | None = None
        """Step that the file is to be cut back to before anything is added."""
        self._due = float("-inf")
        self._known = {identity(record) for record in self.read()}

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records, a line each; those that can't be written wait, and one that is there already is left out."""
        for record in records:
            if identity(record) not in self._known:
                self._known.add(identity(record))
                self._waiting.append(record)
        if time.monotonic() >= self._due:
            self.settle()

    def settle(self) -> None:
        """Write what waits, if it can be written."""
        with contextlib.suppress(*STORAGE_ERRORS):
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: when it can't be written; the file then is as it was.
        """
        began = time.monotonic()
        try:
            if self._cut is not None:
                self._lines.replace("".join(map(_line, self._kept(self._cut))))
                self._cut = None
            self._lines.add("".join(map(_line, self._waiting)))
            self._waiting = []
        finally:
            self._due = time.monotonic() + self._lines.pause(time.monotonic() - began)

    def rewind(self, step: int) -> None:
        """Drop every record after `step`."""
        self._cut = step if self._cut is None else min(step, self._cut)
        self._waiting = [record for record in self._waiting if record["step"] <= step]
        self._known = {identity(record) for record in [*self._kept(self._cut), *self._waiting]}
        self.settle()

    def read(self) -> list[dict[str, Any]]:
        """All records in the order of their steps; a last line that a kill cut off is left out."""
        lines = self._lines.read().split("\n")
        return sorted((json.loads(line) for line in lines[:-1]), key=lambda record: record["step"])

    def table(self) -> pandas.DataFrame:
        """All records as a table, one row each."""
        import pandas

        return pandas.DataFrame(self.read())

    def _kept(self, step: int) -> list[dict[str, Any]]:
        return [record for record in self.read() if record["step"] <= step]


def _line(record: dict[str, Any]) -> str:
    """A record as JSON, which knows no number that isn't finite: null stands for it."""
    odd = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({name: None if name in odd else value for name, value in record.items()}) + "\n"


def identity(record: dict[str, Any]) -> tuple[int, str]:
    """A step is logged at most once for training, once for each evaluation set, and once at the end; each has a loss."""
    return record["step"], next((name for name in sorted(record) if name.endswith("loss")), "")
