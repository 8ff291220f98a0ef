"""The scores as others read them, verified whenever they are opened."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.store import EVAL, MANIFEST, TRAIN
from pipeline.errors import UserError
from pipeline.reference.hashing import file_digest
from pipeline.reference.parts import LOGPS, RECOMPUTE

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.reference.plan import Plan

__all__ = ["Scores", "open_scores"]

SHOWN = 5
"""Differences that a message lists."""


@dataclass(frozen=True)
class Scores:
    """Reference log-probabilities per completion token, row for row those of a prepared store."""

    path: Path
    fingerprint: str
    train_rows: int
    eval_rows: int
    manifest: dict[str, Any]
    forwards: int = 0
    """Forwards of the reference that the call which returned this has run; 0 when all scores were there."""
    scored_rows: int = 0
    """Rows that these forwards scored."""
    padded_because: str | None = None
    """Why these forwards couldn't take packed rows; None where they could, or where there were none."""

    def _repr_html_(self) -> str:
        from pipeline.notebook import html_of
        from pipeline.tables import print_scores

        return html_of(lambda console: print_scores(self, console=console))

    def read(self, split: str = TRAIN) -> pa.Table:
        """`ref_chosen_logps`, `ref_rejected_logps` (list<float32>) of `train` or `eval`, in the prepared rows' order."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert split in (TRAIN, EVAL), split
        files = [entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]
        tables = [pq.read_table(self.path / file, columns=list(LOGPS), partitioning=None) for file in files]
        empty = pa.schema([(name, pa.list_(pa.float32())) for name in LOGPS]).empty_table()
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]) if tables else empty


def open_scores(folder: Path, plan: Plan) -> Scores | None:
    """The scores in `folder`; None when they are not there or not complete.

    Raises:
        UserError: when what is there isn't what the plan's inputs give, or not what was written; it says what differs.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        problems = _problems(manifest, plan, folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{file} can't be read as a manifest of scores ({type(error).__name__}: {error}); {RECOMPUTE}"
        ) from error
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
        lines = "".join(f"\n  {problem}" for problem in [*problems[:SHOWN], *more])
        raise UserError(f"{folder} doesn't hold the scores that this recipe asks for; {RECOMPUTE}{lines}")
    rows = {split: sum(n for part, n in plan.parts.items() if part.startswith(f"{split}/")) for split in (TRAIN, EVAL)}
    return Scores(folder, plan.fingerprint, rows[TRAIN], rows[EVAL], manifest)


def _problems(manifest: dict[str, Any], plan: Plan, folder: Path) -> list[str]:
    """What differs: the inputs of the scores, else the files."""
    found, expected = _flat(manifest["inputs"]), _flat(plan.inputs)
    different = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if different:
        return [
            f"{name}: the recipe gives {_shown(expected.get(name))}, the scores were computed with {_shown(found.get(name))}"
            for name in different
        ]
    files = {entry["file"]: entry for entry in manifest["files"]}
    if set(files) != set(plan.parts):
        return [f"{MANIFEST}: lists {len(files)} parts, the prepared data have {len(plan.parts)}"]
    return [problem for part in plan.parts if (problem := _damage(folder / part, files[part], plan.parts[part]))]


def _shown(value: Any) -> str:
    """A value in a message; of a hash its beginning."""
    return f"{value[:16]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


def _damage(path: Path, entry: dict[str, Any], rows: int) -> str | None:
    """What has become of a part since it was written."""
    if entry["rows"] != rows:
        return f"{entry['file']}: {entry['rows']} rows, the prepared part has {rows}"
    if not path.is_file():
        return f"{entry['file']}: is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{entry['file']}: has {size} bytes, {entry['bytes']} were written"
    digest = file_digest(path)
    if digest != entry["sha256"]:
        return f"{entry['file']}: was changed: its sha256 is {digest[:16]}..., of what was written {entry['sha256'][:16]}..."
    return None


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by their path."""
    if isinstance(value, dict):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list):
        items = [(str(place), child) for place, child in enumerate(value)]
    else:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= _flat(child, f"{path}.{key}" if path else key)
    return flat
