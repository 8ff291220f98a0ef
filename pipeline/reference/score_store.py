"""Complete scores, verified whenever they are opened."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from pipeline.data.store import EVAL, MANIFEST, TRAIN
from pipeline.errors import UserError
from pipeline.io.digests import damage
from pipeline.reference.score_files import LOGPS, RECOMPUTE
from pipeline.ui.console import Printable, lines_of, table_of

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.data import Prepared
    from pipeline.reference.plan import Plan

__all__ = ["Scores", "describe", "open_scores"]

SHOWN = 5
"""Most differences that a message lists."""


@dataclass(frozen=True)
class Scores(Printable):
    """Reference log-probabilities per completion token, row for row those of a prepared store."""

    path: Path
    fingerprint: str
    train_rows: int
    eval_rows: int
    manifest: dict[str, Any]
    forwards: int = 0
    """Forwards of the reference run by the call that returned this; 0 when all scores were cached."""
    scored_rows: int = 0
    """Rows that these forwards scored."""
    padded_because: str | None = None
    """Why these forwards couldn't pack rows; None if they did, or if there were none."""

    def __rich__(self) -> Group:
        return describe(self)

    @property
    def has_hidden_states(self) -> bool:
        """Whether the mean hidden state of each answer was kept (`ray.score.hidden_states`)."""
        return bool(self.manifest["inputs"].get("hidden_states"))

    def read(self, split: str = TRAIN) -> pa.Table:
        """Read `ref_chosen_logps` and `ref_rejected_logps` (list<float32>) of a split, in the order of the prepared rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert split in (TRAIN, EVAL), split
        files = [entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]
        tables = [pq.read_table(self.path / file, columns=list(LOGPS), partitioning=None) for file in files]
        empty = pa.schema([(name, pa.list_(pa.float32())) for name in LOGPS]).empty_table()
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]) if tables else empty


def open_scores(folder: Path, plan: Plan) -> Scores | None:
    """Open and verify the scores in `folder`; None when they are missing or incomplete.

    Raises:
        UserError: when inputs differ from the plan's, or files are damaged, with the differences.
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
    """List differences of the inputs, or if there are none of the files."""
    actual, expected = _flat(manifest["inputs"]), _flat(plan.inputs)
    different = [name for name in sorted(expected.keys() | actual.keys()) if expected.get(name) != actual.get(name)]
    # Files are not read then: those of other inputs are of no use, whole or not.
    if different:
        return [
            f"{name}: the recipe gives {_shown(expected.get(name))}, the scores were computed with {_shown(actual.get(name))}"
            for name in different
        ]
    files = {entry["file"]: entry for entry in manifest["files"]}
    if set(files) != set(plan.parts):
        return [f"{MANIFEST}: lists {len(files)} parts, the prepared data have {len(plan.parts)}"]
    return [problem for part in plan.parts if (problem := _damage(folder / part, files[part], plan.parts[part]))]


def _shown(value: Any) -> str:
    """Format a value for a message; hashes are shortened."""
    return f"{value[:16]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


def _damage(path: Path, entry: dict[str, Any], rows: int) -> str | None:
    """Return how a part differs from its manifest entry, or None."""
    if entry["rows"] != rows:
        return f"{entry['file']}: {entry['rows']} rows, the prepared part has {rows}"
    return damage(path, entry)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists into dotted path -> leaf."""
    if isinstance(value, dict):
        items = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= _flat(child, f"{path}.{key}" if path else key)
    return flat


def describe(scores: Scores, prepared: Prepared | None = None, seconds: float | None = None) -> Group:
    """Return a summary of the score stage and the path of the scores.

    Args:
        scores: result of `score`.
        prepared: the scored rows, to count their tokens.
        seconds: duration of the stage, including loading the reference.
    """
    rows: list[tuple[object, ...]] = [("rows", scores.train_rows, scores.eval_rows)]
    if prepared is not None:
        rows.append(("scored tokens", *(_completion_tokens(prepared, split) for split in (TRAIN, EVAL))))
    forwards = "none, the scores were there already"
    if scores.scored_rows:
        forwards = f"{scores.forwards} over {scores.scored_rows} rows"
        if seconds is not None:
            forwards += f" in {seconds:.1f} s: {scores.scored_rows / seconds:.1f} rows/s"
    unpacked = scores.padded_because and f"one completion at a time: {scores.padded_because}"
    return Group(
        table_of(("", TRAIN, EVAL), rows, title="reference log-probabilities"),
        lines_of({"forwards": forwards, "unpacked": unpacked, "scores": scores.path}),
    )


def _completion_tokens(prepared: Prepared, split: str) -> int:
    """Count completion tokens, each of which has a score."""
    import pyarrow.compute as pc

    lengths = prepared.read(split, ["chosen_length", "rejected_length"])
    return sum(pc.sum(lengths[name]).as_py() or 0 for name in lengths.column_names)
