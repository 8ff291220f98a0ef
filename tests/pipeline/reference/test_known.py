"""Rows that any complete scores of the same reference hold are scored no more, whatever the data they are found in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

from pipeline import prepare, score
from pipeline.data.fingerprint import digest
from pipeline.reference.hashing import row_hashes
from strategies.inference.scoring import PairScorer
from tests.pipeline.reference.conftest import ROWS_PER_TASK

pytestmark = pytest.mark.usefixtures("ray_session")

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


def assert_right(scores: Any, prepared: Any, model: str) -> None:
    """Row for row what a scorer in this process says."""
    scorer = PairScorer(AutoModelForCausalLM.from_pretrained(model).eval(), 160)
    for split in ("train", "eval"):
        expected = scorer.score(prepared.read(split, IDS).to_pylist())
        for row, pair in zip(scores.read(split).to_pylist(), expected, strict=True):
            assert row["ref_chosen_logps"] == pytest.approx(pair[0].tolist(), rel=1e-4, abs=1e-6)
            assert row["ref_rejected_logps"] == pytest.approx(pair[1].tolist(), rel=1e-4, abs=1e-6)
    for file in [*prepared.train_files(), *prepared.eval_files()]:
        part = pq.read_table(scores.path / file.relative_to(prepared.path))
        rows = pq.read_table(file)
        assert part["row_id"].equals(rows["row_id"])
        assert part["ids"].to_pylist() == row_hashes(rows).to_pylist()


@pytest.mark.parametrize("keys", [{"seed": 7}, {"seed": 8, "val_set_size": 20}, {"val_set_size": 0.0}])
def test_another_split_scores_nothing(
    copied: Any, scores: Any, recipe: Any, tiny_base: str, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr("pipeline.reference.scoring.run_pool", None)
    cfg = recipe(dataset_prepared_path=copied[0].dataset_prepared_path, **keys)
    prepared = prepare(cfg)
    again = score(cfg, prepared)
    assert again.fingerprint != scores.fingerprint
    assert (again.forwards, again.scored_rows, again.manifest["forwards"]) == (0, 0, 0)
    assert again.train_rows + again.eval_rows == 60
    assert sorted(path.name for path in again.path.iterdir() if path.name != "eval") == ["manifest.json", "train"]
    assert_right(again, prepared, tiny_base)


def test_of_one_more_dataset_only_its_rows_are_scored(copied: Any, recipe: Any, tiny_base: str, tmp_path: Path) -> None:
    new = [{"prompt": f"New {row}? ", "chosen": "Yes" + "!" * row, "rejected": "No"} for row in range(13)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    datasets = [*copied[0].datasets, {"path": str(tmp_path / "new.jsonl")}]
    cfg = recipe(dataset_prepared_path=copied[0].dataset_prepared_path, datasets=datasets)
    prepared = prepare(cfg)
    seen: list[dict[str, Any]] = []
    again = score(cfg, prepared, progress=seen.append, rows_per_task=ROWS_PER_TASK)
    assert again.scored_rows == 13
    assert again.forwards == again.manifest["forwards"] > 0
    assert seen[-1]["rows_done"] == seen[-1]["rows_total"] == 73
    assert_right(again, prepared, tiny_base)


def test_unknown_rows_among_known_ones(copied: Any, recipe: Any, tiny_base: str, tmp_path: Path) -> None:
    """Every third row of a file is new."""
    lines = Path(copied[0].datasets[0].path).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[::3]:
        row["rejected"] += " at all"
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = recipe(
        dataset_prepared_path=copied[0].dataset_prepared_path,
        datasets=[{"path": str(tmp_path / "mixed.jsonl")}],
        val_set_size=0.0,
    )
    prepared = prepare(cfg)
    again = score(cfg, prepared, rows_per_task=4)
    assert again.scored_rows == len(rows[::3]) == 9
    assert_right(again, prepared, tiny_base)


def test_damaged_scores_of_others_and_those_of_another_model_are_passed_over(
    copied: Any, recipe: Any, prepared: Any, tiny_base: str
) -> None:
    cfg, folder = copied
    shutil.copytree(folder, folder.parent / "renamed")
    edited = json.loads((folder / "manifest.json").read_text())
    edited["inputs"]["reference"]["model"]["files"]["model.safetensors"] = "0" * 64
    another = Path(shutil.copytree(folder, folder.parent / digest(edited["inputs"])))
    (another / "manifest.json").write_text(json.dumps(edited))
    part = folder / "train" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    (folder.parent / "torn").mkdir()
    (folder.parent / "torn" / "manifest.json").write_text("{")
    cfg = recipe(dataset_prepared_path=cfg.dataset_prepared_path, val_set_size=0.0)
    other = prepare(cfg)
    again = score(cfg, other)
    assert again.scored_rows == pq.read_metadata(prepared.path / "train" / part.name).num_rows
    assert_right(again, other, tiny_base)


def test_recompute_copies_nothing(copied: Any, recipe: Any) -> None:
    cfg = recipe(dataset_prepared_path=copied[0].dataset_prepared_path, seed=7)
    assert score(cfg).scored_rows == 0
    assert score(cfg, recompute=True).scored_rows == 60


def test_hashes_tell_where_a_list_ends() -> None:
    rows = [([1], [2], [3]), ([1, 2], [], [3]), ([], [1, 2], [3]), ([1], [2, 3], []), ([1], [2], [3])]
    table = pa.table({name: pa.array([row[place] for row in rows], pa.list_(pa.int32())) for place, name in enumerate(IDS)})
    hashes = row_hashes(table).to_pylist()
    assert hashes[0] == hashes[4]
    assert len(set(hashes)) == 4
    assert row_hashes(pa.concat_tables([table, table]).slice(3, 4)).to_pylist() == [*hashes[3:], *hashes[:2]]
    assert len(row_hashes(table.slice(0, 0))) == 0
