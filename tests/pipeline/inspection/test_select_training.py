"""Runs on a part of the rows: which rows they train on, and what they leave as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import prepare, score, train, tune
from pipeline.data import Prepared
from pipeline.errors import UserError
from pipeline.inspection.columns import content_columns, measure_columns
from pipeline.ray.tasks import run_here, run_on_ray
from pipeline.reference import Scores
from tests.recipes import Recipe, small_recipe
from tests.tiny import labelled

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, **keys)`: 32 training pairs and 8 for evaluation, one worker, 8 steps of four pairs."""
    return small_recipe(tiny_base, tmp_path_factory.mktemp("data"), bf16=False)


@pytest.fixture(scope="module")
def scored(ray_session: Any, recipe: Recipe) -> tuple[Prepared, Scores]:
    cfg = recipe(Path("unused"))
    prepared = prepare(cfg)
    return prepared, score(cfg, prepared)


def files_of(scores: Scores) -> dict[str, tuple[int, bytes]]:
    """Everything below the folder of all scores, with its time of modification."""
    paths = (path for path in scores.path.parent.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the actors that run the reference."""
    calls: list[Any] = []
    monkeypatch.setattr("pipeline.reference.scoring.run_pool", lambda *_: calls.append(1) or iter(()))
    return calls


def trained_rows(folder: Path) -> list[int]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return sorted(row for line in lines for row in json.loads(line)["row_ids"])


@pytest.mark.parametrize("by", ["score_gap", "near_duplicates"])
def test_a_run_trains_on_the_selected_rows_and_runs_no_reference(
    recipe: Recipe, scored: tuple[Prepared, Scores], forwards: list[Any], tmp_path: Path, by: str
) -> None:
    prepared, scores = scored
    before = files_of(scores)
    cfg = recipe(tmp_path / "run", select={"by": by, "from": "bottom", "keep": 0.5}, evals_per_epoch=1)
    result = train(cfg, report=False)
    columns = measure_columns(cfg, prepared, scores) if by == "score_gap" else content_columns(cfg, prepared)
    table = columns.read("train").to_pandas()
    expected = table.sort_values(by, kind="stable")["row_id"].head(16)
    assert trained_rows(tmp_path / "run") == sorted(expected)
    assert forwards == [] and files_of(scores) == before
    assert result.history["step"].max() == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["total_steps"] == 4
    with pytest.raises(UserError, match="select: was .*'keep': 0.5.* is .*'keep': 0.25"):
        train(recipe(tmp_path / "run", select={"by": by, "from": "bottom", "keep": 0.25}, evals_per_epoch=1), resume=True)


def test_labelled_rows_are_selected_too(recipe: Recipe, forwards: list[Any], tmp_path: Path) -> None:
    """The ledger names pairs alone, so the tokens that were trained on tell which rows they were."""
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled(40)))
    keys = {"rl": "kto", "datasets": [{"path": str(tmp_path / "labelled.jsonl")}]}
    cfg = recipe(tmp_path / "run", **keys, select={"by": "completion_length", "from": "middle", "keep": 0.5}, evals_per_epoch=1)
    result = train(cfg, report=False)
    lengths = measure_columns(cfg, prepare(cfg), None).read("train").to_pandas()
    tokens = lengths["prompt_length"] + lengths["completion_length"]
    kept = lengths["completion_length"].sort_values(kind="stable").index[8:24]
    assert result.history["step"].max() == 4 and result.metrics["num_tokens"] == tokens[kept].sum()
    assert len({tokens[part].sum() for part in (kept, lengths.index[:16], lengths.index[16:])}) == 3
    assert forwards == []


def test_what_leaves_nothing_is_refused_before_workers_start(recipe: Recipe, scored: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"select.keep: 0.01 of 32 training rows leaves none"):
        train(recipe(tmp_path / "run", select={"by": "score_gap", "keep": 0.01}))


def test_a_sweep_searches_the_selection_without_a_forward(
    recipe: Recipe, scored: tuple[Prepared, Scores], forwards: list[Any], tmp_path: Path
) -> None:
    before = files_of(scored[1])
    space = {"select.keep": {"grid": [0.25, 1]}, "rl_beta": {"grid": [0.1]}}
    search = {"space": space, "search": "grid", "baseline": False}
    result = tune(recipe(tmp_path / "sweep", select={"by": "score_gap", "keep": 0.5}, tune=search))
    assert set(result.table["status"]) == {"finished"}
    steps = {record.values["select.keep"]: record.total_steps for record in result.records}
    assert steps == {0.25: 2, 1: 8}
    assert forwards == [] and files_of(scored[1]) == before


def test_ray_computes_the_same_columns(recipe: Recipe, scored: tuple[Prepared, Scores], tmp_path: Path) -> None:
    prepared, scores = scored
    cfg = recipe(tmp_path / "run")
    columns = [measure_columns(cfg, prepared, scores, run_here), content_columns(cfg, prepared, run_here)]
    written = [{path: path.read_bytes() for path in one.path.rglob("*.parquet")} for one in columns]
    for one in columns:
        (one.path / "manifest.json").unlink()
    again = [measure_columns(cfg, prepared, scores, run_on_ray), content_columns(cfg, prepared, run_on_ray)]
    assert again == columns
    assert [{path: path.read_bytes() for path in one.path.rglob("*.parquet")} for one in again] == written


def test_hidden_states_are_kept_beside_the_scores_and_serve_recipes_without(
    recipe: Recipe, scored: tuple[Prepared, Scores], tmp_path: Path
) -> None:
    own = {"dataset_prepared_path": str(tmp_path / "prepared")}
    cfg = recipe(tmp_path / "run", ray={"score": {"hidden_states": True}}, **own)
    prepared = prepare(cfg)
    scores = score(cfg, prepared)
    assert scores.scored_rows == 40 and scores.fingerprint != scored[1].fingerprint
    assert scores.read().equals(scored[1].read())
    values = measure_columns(cfg, prepared, scores).read("train", ["ches"])["ches"].to_numpy()
    assert values.std() > 0
    without = score(recipe(tmp_path / "run", **own), prepared)
    assert without.scored_rows == 0 and without.read().equals(scores.read())
