"""Complete scores, verified whenever they are opened."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Group

from pipeline.data.store import EVAL, MANIFEST, TRAIN
from pipeline.errors import UserError
from pipeline.io.digests import difference
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, reason
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead
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

    path: Location
    fingerprint: str
    train_rows: int
    eval_rows: int
    manifest: dict[str, Any]
    folder: Folder = field(repr=False, compare=False)
    """By which `path` is read, also by the workers that it is sent to."""
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

    def parts(self, split: str) -> list[str]:
        """Return the names of the files of `train` or `eval`, in order: those of the prepared rows."""
        assert split in (TRAIN, EVAL), split
        return [entry["file"] for entry in self.manifest["files"] if entry["file"].startswith(f"{split}/")]

    def read_part(self, part: str, columns: Sequence[str] = LOGPS) -> pa.Table:
        """Read `ref_chosen_logps` and `ref_rejected_logps` (list<float32>) of a part, in the order of its prepared rows.

        Args:
            part: its name, of `parts`.
            columns: others, such as those of hidden states where they were kept.

        Raises:
            UserError: when it is missing, or at a URI was changed or can't be read.
            OSError, pyarrow.ArrowException: when a local file can't be read.
        """
        try:
            if self.folder.is_local:
                return self.folder.read_table(part, list(columns)).replace_schema_metadata(None)
            [entry] = [entry for entry in self.manifest["files"] if entry["file"] == part]
            data = self.folder.read_bytes(part)
        except FileNotFoundError as error:
            raise UserError(_not_as_computed(self.folder, [f"{part}: is missing"])) from error
        except STORAGE_ERRORS as error:
            if self.folder.is_local:
                raise
            raise UserError(
                f"dataset_prepared_path: {inside(self.folder.where, part)} can't be read: {reason(error)}"
            ) from error
        if (problem := difference(data, entry)) is not None:
            raise UserError(_not_as_computed(self.folder, [problem]))
        return decoded(data, list(columns)).replace_schema_metadata(None)

    def read(self, split: str = TRAIN) -> pa.Table:
        """Read `ref_chosen_logps` and `ref_rejected_logps` (list<float32>) of a split, in the order of the prepared rows."""
        import pyarrow as pa

        read = map if self.folder.is_local else ahead
        tables = list(read(self.read_part, self.parts(split)))
        return (
            pa.concat_tables(tables) if tables else pa.schema([(name, pa.list_(pa.float32())) for name in LOGPS]).empty_table()
        )


def open_scores(folder: Folder, plan: Plan, verify: bool = True) -> Scores | None:
    """Open the scores in `folder`; None when they are missing or incomplete.

    Args:
        verify: compare every file with the manifest: size and hash; at a URI, the size.

    Raises:
        UserError: when inputs differ from the plan's, or files are damaged, with the differences.
    """
    if not folder.exists(MANIFEST):
        return None
    text = folder.read_bytes(MANIFEST)
    try:
        manifest = json.loads(text)
        problems = _problems(manifest, plan, folder, verify)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{inside(folder.where, MANIFEST)} can't be read as a manifest of scores ({type(error).__name__}: {error}); "
            f"{RECOMPUTE}"
        ) from error
    if problems:
        raise UserError(_not_as_computed(folder, problems))
    rows = {split: sum(n for part, n in plan.parts.items() if part.startswith(f"{split}/")) for split in (TRAIN, EVAL)}
    return Scores(folder.where, plan.fingerprint, rows[TRAIN], rows[EVAL], manifest, folder)


def _not_as_computed(folder: Folder, problems: list[str]) -> str:
    more = [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
    lines = "".join(f"\n  {problem}" for problem in [*problems[:SHOWN], *more])
    return f"{folder.where} doesn't hold the scores that this recipe asks for; {RECOMPUTE}{lines}"


def _problems(manifest: dict[str, Any], plan: Plan, folder: Folder, verify: bool) -> list[str]:
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
    if different := [part for part in plan.parts if files[part]["rows"] != plan.parts[part]]:
        return [f"{part}: {files[part]['rows']} rows, the prepared part has {plan.parts[part]}" for part in different]
    # One request for all sizes.
    sizes = None if folder.is_local else folder.files()
    return [problem for part in plan.parts if verify and (problem := folder.damage(files[part], sizes))]


def _shown(value: Any) -> str:
    """Format a value for a message; hashes are shortened."""
    return f"{value[:16]}..." if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else repr(value)


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
