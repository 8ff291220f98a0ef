"""The page of a run: from a real run, looked at in a real browser; and what it says where parts are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline import TrainResult, train, write_report
from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.report.curves import curve_sections
from pipeline.report.page import Page, render
from pipeline.report.run import run_page
from pipeline.training.folder import RunFolder
from tests.browser import faintest, needs_chromium, open_page, undrawn
from tests.tiny import pairs

runner = CliRunner()
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> </pre> {{ 7 * 7 }}"
LONG = "a/very/long/path/without/any/space" * 8
REJECTED = [
    *({"prompt": f"row {row}", "chosen": "same", "rejected": "same"} for row in range(3)),
    {"prompt": "b", "chosen": 5, "rejected": "c"},
    {"prompt": "b", "chosen": True, "rejected": "c"},
]
"""Rows of two kinds of faults; the reasons of the second kind differ from row to row."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def run(ray_session: Any, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Eight steps of DPO on two workers, with answers at two evaluations to prompts that attack the page."""
    folder = tmp_path_factory.mktemp("report")
    asked = [{**pair, "prompt": text} for pair, text in zip(pairs(4), (HOSTILE, LONG, "a \u0007\u202e bell", "d"), strict=True)]
    return train(
        parse_config(
            {
                "base_model": tiny_base,
                "datasets": [{"path": write_rows(folder / "rows.jsonl", [*pairs(32), *REJECTED])}],
                "test_datasets": [{"path": write_rows(folder / "asked.jsonl", asked)}],
                "dataset_prepared_path": str(folder / "prepared"),
                "max_rejected_fraction": 0.5,
                "sequence_len": 400,
                "adapter": "lora",
                "learning_rate": 1e-3,
                "micro_batch_size": 2,
                "max_steps": 8,
                "logging_steps": 1,
                "eval_steps": 4,
                "save_steps": 4,
                "dpo_generate_during_eval": True,
                "hub_token": "hf_" + "a" * 30,
                "output_dir": str(folder / "run"),
                "ray": {"num_workers": 2},
            }
        )
    )


@pytest.fixture
def copy(run: TrainResult, tmp_path: Path) -> Path:
    """The folder of the run, moved to another place, to break something in."""
    shutil.copytree(run.run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "model"))
    (tmp_path / "copy" / "report.html").unlink()
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def text(run: TrainResult) -> str:
    """The page without plotly."""
    html = Path(str(run.report)).read_text(encoding="utf-8")
    return html[html.index("<body>") :]


def test_a_run_leaves_its_page(run: TrainResult, text: str) -> None:
    assert run.report == Path(str(run.run_dir)) / "report.html"
    assert "<b>finished</b>" in text and "<b>8 of 8</b>" in text
    assert f"{run.metrics['eval_loss']:.4g}" in text and f"{int(run.metrics['num_tokens']):,}" in text


def test_what_a_run_was_given_and_had(text: str) -> None:
    assert "2 workers of 1 CPU" in text and "weights in float32, products in float32" in text
    assert "4 = 2 (micro batch) x 2 (workers)" in text
    assert "packed rows, " in text and "padded batches of 2 pairs hold" in text
    assert "every worker holds the whole model" in text
    events = json.loads(text and (RUN_JSON.read_text() if (RUN_JSON := None) else "[]"))
    assert events == []
