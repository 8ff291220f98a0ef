"""`prefray score`, and what `train` says about rows that are too long."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import train
from pipeline.cli import app
from pipeline.config import dump_config
from pipeline.errors import UserError
from pipeline.reference.score_store import describe
from pipeline.ui.console import open_console

pytestmark = pytest.mark.usefixtures("ray_session")
runner = CliRunner()


@pytest.fixture(autouse=True)
def _handlers_of_an_earlier_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's log handlers keep the stream of the first command that the runner ran, which is closed by now."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


def test_score_ends_with_a_table_and_the_path(scores: Any, copied: Any, prepared: Any, tmp_path: Path) -> None:
    cfg, folder = copied
    (tmp_path / "recipe.yaml").write_text(dump_config(cfg))
    result = runner.invoke(app, ["score", str(tmp_path / "recipe.yaml"), "--quiet"])
    assert result.exit_code == 0, result.stderr
    assert {"rows", "52", "8"} <= set(result.stdout.split())
    lengths = prepared.read("train", ["chosen_length", "rejected_length"])
    assert str(sum(sum(column.to_pylist()) for column in lengths)) in result.stdout.split()
    assert "forwards  none, the scores were there already" in result.stdout
    assert f"scores    {folder}" in result.stdout
    assert str(scores.path) in scores._repr_html_() and "forwards" in scores._repr_html_()
    assert "scoring the reference" in result.stderr

    (folder / "train" / "part-00000.parquet").unlink()
    damaged = runner.invoke(app, ["score", str(tmp_path / "recipe.yaml"), "--quiet"])
    assert damaged.exit_code == 2
    assert "prefray score RECIPE --recompute" in damaged.stderr
    assert "part-00000.parquet: is missing" in damaged.stderr


def test_what_was_computed_is_printed_with_its_speed(scores: Any, prepared: Any, capsys: pytest.CaptureFixture[str]) -> None:
    open_console().print(describe(scores, prepared, seconds=4.0))
    assert f"forwards  {scores.forwards} over 60 rows in 4.0 s: 15.0 rows/s" in capsys.readouterr().out


@pytest.mark.main_job
def test_score_of_a_method_without_reference_is_status_2(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_config(recipe()))
    result = runner.invoke(app, ["score", str(tmp_path / "recipe.yaml"), "--set", "rl=orpo"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["prefray: reference: rl: orpo uses no reference; there is nothing to score"]


@pytest.mark.main_job
@pytest.mark.parametrize("rl", ["dpo", "simpo"])
def test_training_names_a_row_that_is_longer_than_a_forward(recipe: Any, prepared: Any, tmp_path: Path, rl: str) -> None:
    cfg = recipe(rl=rl, tokens_per_forward=30, output_dir=str(tmp_path / "run"))
    message = r"^tokens_per_forward: 30 tokens don't hold row \d+ of .*pairs-\d.jsonl, which takes \d+ "
    with pytest.raises(UserError, match=message):
        train(cfg)


def test_padded_training_has_no_such_limit(recipe: Any, prepared: Any) -> None:
    from pipeline.reference import check_training_budget

    check_training_budget(recipe(rl="simpo", sample_packing=False, tokens_per_forward=None, sequence_len=1), prepared)
