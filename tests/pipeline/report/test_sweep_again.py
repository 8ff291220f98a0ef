"""The page of a sweep, written again from its folder; no trial is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import write_report
from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.shared_stages import SharedStages

METRIC = "eval_rewards/accuracies"
SHARED = SharedStages(evaluations=2, stores=1, rows=40, prepare_seconds=1.0, score_seconds=2.0, forwards=8, scored=True)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    """Two trials, of which one has failed, in a sweep that was started elsewhere."""
    keys = {"base_model": "m", "datasets": [{"path": "a.jsonl"}], "val_set_size": 8, "output_dir": "elsewhere"}
    tune = {"space": {"learning_rate": {"loguniform": [1e-6, 1e-4]}}, "num_samples": 2}
    folder = SweepFolder(tmp_path / "sweep")
    folder.open(parse_config({**keys, "tune": tune}), resume=False)
    folder.write_state({"status": "finished", "shared": SHARED.summary(), "directory": "/of/another/machine"})
    done = TrialRecord(0, {"learning_rate": 2e-5}, "finished", "000", 8, 8, {METRIC: 0.75}, 100, 3.0)
    failed = TrialRecord(1, {"learning_rate": 9e-5}, "failed", None, reason="out of <b>memory</b>")
    folder.write_records([done, failed])
    (tmp_path / "sweep" / "trials" / "000").mkdir(parents=True)
    (tmp_path / "sweep" / "trials" / "000" / "metrics.jsonl").write_text(json.dumps({"step": 4, METRIC: 0.5}) + "\n")
    return folder


def test_the_command_writes_it_again(sweep: SweepFolder) -> None:
    done = CliRunner().invoke(app, ["report", str(sweep.path)])
    assert (done.exit_code, done.stdout) == (0, f"{sweep.path}/report.html\n"), done.stderr
    page = Path(str(sweep.path), "report.html").read_text(encoding="utf-8")
    assert f"Sweep of {sweep.path}</h1>" in page and "best eval accuracy (trial 0)" in page
    assert "out of &lt;b&gt;memory&lt;/b&gt;" in page and "2e-05" in page


def test_a_sweep_whose_trials_have_not_begun(sweep: SweepFolder) -> None:
    sweep.storage.delete("trials.json")
    assert "Metrics over time" in Path(str(write_report(sweep.path))).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sweep.json", '{"status": ', "sweep.json is broken: Expecting"),
        ("sweep.json", '{"status": "started"}', "has no trials yet: its data are prepared, or were when it was stopped"),
        ("sweep.json", '{"status": "started", "shared": {"x": 1}}', "sweep.json in .* is broken"),
        ("trials.json", '[{"name": 1}]', "trials.json in .* is broken"),
        ("trials.json", "[", "trials.json is broken"),
        ("config.yaml", None, "holds a part of a sweep: config.yaml is missing; put it back"),
        ("config.yaml", "base_model: m\ndatasets: [{path: a}]", "the recipe of a sweep has a `tune:` section"),
    ],
)
def test_what_is_broken_is_said(sweep: SweepFolder, name: str, content: str | None, message: str) -> None:
    if content is None:
        sweep.storage.delete(name)
    else:
        sweep.storage.write(name, content)
    with pytest.raises(UserError, match=message):
        write_report(sweep.path)
