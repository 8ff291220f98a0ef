"""Trials as tables and as a page, without running any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.config import parse_config
from pipeline.report.sweep import sweep_page
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import TrialRecord, dump, load, table_of
from pipeline.tuning.result import SweepResult
from pipeline.tuning.shared_stages import SharedStages, SweepSavings

MEASURE = SweepObjective((Objective("eval_a", "max"),), {}, ("eval_a", "eval_kl"))
SHARED = SharedStages(evaluations=4, stores=1, rows=40, prepare_seconds=1.0, score_seconds=2.0, forwards=8, scored=True)
MIXED = [
    {"bf16": "auto", "weight_decay": 0.001, "rl": "dpo", "lora_target_modules": ["q_proj"]},
    {"bf16": False, "weight_decay": 0, "rl": "simpo", "lora_target_modules": None},
    {"bf16": True, "weight_decay": 0.1, "rl": "dpo"},
]


def records(values: list[dict[str, Any]]) -> list[TrialRecord]:
    found = [TrialRecord(0, None, "finished", "000", 8, 8, {"eval_a": 0.5, "eval_kl": 0.0}, 100, 3.0)]
    for number, one in enumerate(values, 1):
        metrics = {"eval_a": number / 4, "eval_kl": -float(number)}
        found.append(TrialRecord(number, one, "stopped", f"{number:03d}", 4, 8, metrics, 50, 2.0))
    return found


def test_values_of_several_kinds_stand_in_one_column(tmp_path: Path) -> None:
    table = table_of(records(MIXED), list(MIXED[0]))
    assert table["bf16"].tolist()[1:] == ["auto", "false", "true"]
    assert table["weight_decay"].tolist()[1:] == [0.001, 0, 0.1]
    assert table["lora_target_modules"].tolist()[1] == '["q_proj"]'
    table.to_parquet(tmp_path / "table.parquet")
    assert pd.read_parquet(tmp_path / "table.parquet")["bf16"].tolist()[1:] == ["auto", "false", "true"]


def test_a_page_of_values_of_several_kinds(tmp_path: Path) -> None:
    space = {
        "bf16": {"choice": ["auto", False, True]},
        "weight_decay": [{"loguniform": [1e-3, 0.1], "when": {"rl": "dpo"}}, {"choice": [0], "when": {"rl": "simpo"}}],
        "rl": {"choice": ["dpo", "simpo"]},
    }
    cfg = parse_config(
        {
            "base_model": "m",
            "datasets": [{"path": "d"}],
            "val_set_size": 4,
            "output_dir": str(tmp_path),
            "tune": {"space": space},
        }
    )
    values = [{key: one[key] for key in space} for one in MIXED]
    page = sweep_page(SweepResult(tmp_path, cfg, MEASURE, records(values)), SweepFolder(tmp_path), SHARED)
    assert "Parallel coordinates" in page and "Ending trials early left out 12 of 32 steps (38%)" in page


def test_what_sharing_has_saved() -> None:
    saved = SweepSavings.of(records(MIXED), SHARED)
    assert (saved.trials, saved.tokens, saved.steps, saved.steps_left) == (4, 250, 32, 12)
    assert any("for each trial anew it would have taken 6.0 s more" in sentence for sentence in saved.sentences())


def test_records_come_back_and_what_ran_is_waiting_again() -> None:
    first, second, *_ = records(MIXED)
    second.begin()
    assert second.spent >= 2.0 and second.time_left == pytest.approx(2.0, abs=0.5)
    again = load(json.loads(dump([first, second])))
    assert again[0] == first
    assert (again[1].status, again[1].since, again[1].values) == ("waiting", None, json.loads(json.dumps(second.values)))
