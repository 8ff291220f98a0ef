"""Scores that aren't what was written, or not what is asked for, are refused with what differs, and mended on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import score
from pipeline.errors import UserError

PART = "train/part-00001.parquet"


def truncate(folder: Path) -> None:
    data = (folder / PART).read_bytes()
    (folder / PART).write_bytes(data[: len(data) // 2])


def flip(folder: Path) -> None:
    data = bytearray((folder / PART).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / PART).write_bytes(data)


def remove(folder: Path) -> None:
    (folder / PART).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def drop_part(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["files"].pop())


def other_dtype(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest["inputs"]["precision"].update(weights="bfloat16"))


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"part-00001.parquet: has \d+ bytes, \d+ were written"),
        (flip, r"part-00001.parquet: was changed: its sha256 is \w+..., of what was written \w+..."),
        (remove, "part-00001.parquet: is missing"),
        (cut_manifest, "manifest.json can't be read as a manifest of scores .JSONDecodeError"),
        (empty_manifest, "manifest.json can't be read as a manifest of scores .KeyError"),
        (drop_part, r"manifest.json: lists \d parts, the prepared data have \d"),
        (other_dtype, "precision.weights: the recipe gives 'float32', the scores were computed with 'bfloat16'"),
    ],
)
def test_damage_is_refused_and_named(copied: Any, prepared: Any, damage: Callable[[Path], None], message: str) -> None:
    cfg, folder = copied
    damage(folder)
    with pytest.raises(UserError, match=f"(?s){folder}.*score RECIPE --recompute.*{message}|{message}.*RECIPE --recompute"):
        score(cfg, prepared)


@pytest.mark.main_job
def test_scores_of_another_model_and_of_other_data(copied: Any, recipe: Any, prepared: Any, tmp_path: Path) -> None:
    """A folder that was put where other scores belong."""
    from pipeline.reference.plan import make_plan
    from pipeline.reference.precision import resolve_precision
    from tests.tiny import save_tiny

    cfg, folder = copied
    other = cfg.model_copy(update={"reference_model": save_tiny(tmp_path / "other", seed=1)})
    plan = make_plan(other, prepared, resolve_precision(other, use_gpu=False))
    shutil.move(folder, folder.parent / plan.fingerprint)
    name = "reference.model.files.model.safetensors"
    with pytest.raises(UserError, match=rf"{name}: the recipe gives \w+\.\.\., the scores were computed with \w+\.\.\."):
        score(other, prepared)
    manifest = folder.parent / plan.fingerprint / "manifest.json"
    edited = json.loads(manifest.read_text())
    edited["inputs"] = json.loads(json.dumps(plan.inputs))
    edited["inputs"]["parts"][0]["ids"] = "0" * 64
    manifest.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"parts.0.ids: the recipe gives \w+\.\.\., the scores were computed with 0000"):
        score(other, prepared)


def other_rows(folder: Path) -> None:
    shutil.copy(folder / "train" / "part-00000.parquet", folder / PART)


def edit(folder: Path) -> None:
    """Other values, in a file that is whole."""
    table = pq.read_table(folder / PART)
    chosen = pa.array([[value - 1 for value in row] for row in table["ref_chosen_logps"].to_pylist()], pa.list_(pa.float32()))
    table = table.set_column(table.column_names.index("ref_chosen_logps"), "ref_chosen_logps", chosen)
    pq.write_table(table, folder / PART)


@pytest.mark.parametrize(("damage", "staged"), [(flip, False), (other_rows, False), (edit, False), (flip, True)])
def test_what_a_killed_run_has_left_damaged_is_computed_again(
    copied: Any, prepared: Any, scores: Any, damage: Callable[[Path], None], staged: bool
) -> None:
    """Of files that are not published yet, a damaged one costs its own rows and stops nobody."""
    cfg, folder = copied
    (folder / "manifest.json").unlink()
    damage(folder)
    if staged:
        (folder / "staging").mkdir()
        (folder / PART).rename(folder / "staging" / "train-part-00001-00000000-00000010.parquet")
    again = score(cfg, prepared)
    assert again.scored_rows == pq.read_metadata(prepared.path / PART).num_rows > 0
    assert sorted(path.name for path in folder.iterdir()) == ["eval", "manifest.json", "train"]
    assert_same(again.read(), scores.read())


def assert_same(mine: pa.Table, theirs: pa.Table) -> None:
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine.to_pylist(), theirs.to_pylist(), strict=True):
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
