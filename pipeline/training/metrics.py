"""`metrics.jsonl`: one record per logging or evaluation step, each step once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["MetricsFile"]


class MetricsFile:
    """Appends records; when a run restarts from a checkpoint, drops those that are about to be repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add records, a line each."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def rewind(self, step: int) -> None:
        """Drop every record after `step`."""
        kept = [record for record in self.read() if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that a kill cut off is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def table(self) -> pandas.DataFrame:
        """All records as a table, one row each."""
        import pandas

        return pandas.DataFrame(self.read())
