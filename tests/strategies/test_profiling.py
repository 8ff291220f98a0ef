"""Traces of steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from strategies.config import as_config
from tests.laws.runs import CONFIG, built, trained


def traces(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "profiles").glob("*"))


def test_steps_are_traced_and_a_resumed_run_traces_the_rest(tmp_path: Path) -> None:
    keys = {"micro_batch_size": 4, "save_strategy": "steps", "save_steps": 1, "profile": {"steps": [2, 3]}}
    trained(tmp_path, **keys)
    assert traces(tmp_path) == ["steps-2-3.rank-0.json.gz"]
    with gzip.open(tmp_path / "profiles" / "steps-2-3.rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= names
    for step, more in ((2, ["steps-3-3.rank-0.json.gz"]), (3, [])):
        for name in traces(tmp_path):
            (tmp_path / "profiles" / name).unlink()
        built(tmp_path, **keys).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert traces(tmp_path) == more


def test_a_run_that_ends_before_the_last_step_keeps_its_trace(tmp_path: Path) -> None:
    trained(tmp_path, micro_batch_size=4, profile={"steps": [4, 9]})
    assert traces(tmp_path) == ["steps-4-4.rank-0.json.gz"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([6, 3], r"the first step 6 is after the last one 3; write \[3, 6\]"),
        ([1, 80], r"80 steps are too many for one trace; give at most 50, such as \[1, 4\]"),
        ([0, 3], r"greater than 0"),
        ([50, 51], r"profile.steps: step 50 is after the run's last, 40; give steps from 1 to 40"),
    ],
)
def test_steps_that_make_no_sense_are_refused(steps: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_config({**CONFIG, "output_dir": "x", "max_steps": 40, "profile": {"steps": steps}})
