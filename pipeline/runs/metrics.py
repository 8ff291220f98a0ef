"""`metrics.jsonl`: one record per logging or evaluation step."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Location
from pipeline.runs.jsonl import open_append_only

if TYPE_CHECKING:
    import pandas

__all__ = ["MetricsFile", "identity"]


class MetricsFile:
    """Appends records without duplicates; when a run restarts from a checkpoint, drops those that will be repeated.

    Records that can't be written, since the disk is full or storage fails, are written with the next call, so that a run
    doesn't fail because of its log.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self._file = open_append_only(path)
        self._waiting: list[dict[str, Any]] = []
        self._cut: int | None = None
        """Step after which records are to be dropped with the next write."""
        self._due = float("-inf")
        self._known = {identity(record) for record in self.read()}

    def append(self, records: list[dict[str, Any]]) -> None:
        """Append records, a line each, without duplicates; those that can't be written now are kept for the next write."""
        for record in records:
            if identity(record) not in self._known:
                self._known.add(identity(record))
                self._waiting.append(record)
        if time.monotonic() >= self._due:
            self.flush_best_effort()

    def flush_best_effort(self) -> None:
        """Write pending records, if storage doesn't fail."""
        with contextlib.suppress(*STORAGE_ERRORS):
            self.flush()

    def flush(self) -> None:
        """Write pending records.

        Raises:
            OSError: when they can't be written; the file is unchanged then.
        """
        start = time.monotonic()
        try:
            # Replaced before it is appended to: that also removes a last line that a killed driver has written in part.
            if self._cut is not None:
                self._file.replace("".join(map(_line, self._kept(self._cut))))
                self._cut = None
            self._file.add("".join(map(_line, self._waiting)))
            self._waiting = []
        finally:
            self._due = time.monotonic() + self._file.min_interval(time.monotonic() - start)

    def rewind(self, step: int) -> None:
        """Drop every record after `step`."""
        # An earlier rewind may still wait for storage.
        self._cut = step if self._cut is None else min(step, self._cut)
        self._waiting = [record for record in self._waiting if record["step"] <= step]
        self._known = {identity(record) for record in [*self._kept(self._cut), *self._waiting]}
        self.flush_best_effort()

    def read(self) -> list[dict[str, Any]]:
        """Read all records, sorted by step; a truncated last line is ignored.

        Raises:
            UserError: for any other line that is no record.
        """
        lines = self._file.read().split("\n")
        # What follows the last line break is empty, or half a record.
        records = [self._parsed(line, number) for number, line in enumerate(lines[:-1], 1)]
        return sorted(records, key=lambda record: record["step"])

    def table(self) -> pandas.DataFrame:
        """Read all records as a table, one row each."""
        import pandas

        return pandas.DataFrame(self.read())

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{self.path}: line {number} is no record of a step, but {line[:60]!r}; delete that line")
        return record

    def _kept(self, step: int) -> list[dict[str, Any]]:
        return [record for record in self.read() if record["step"] <= step]


def _line(record: dict[str, Any]) -> str:
    """Format a record as JSON, with null for numbers that aren't finite, which JSON doesn't have."""
    odd = {name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps({name: None if name in odd else value for name, value in record.items()}) + "\n"


def identity(record: dict[str, Any]) -> tuple[int, str]:
    """Return the key of a record: its step and the name of its loss.

    A step is logged at most once for training, once for each evaluation set, and once at the end; each has another loss.
    """
    return record["step"], next((name for name in sorted(record) if name.endswith("loss")), "")
