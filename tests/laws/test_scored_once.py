"""Law 9: N trials run the reference forward once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import score, train
from pipeline.config import RunConfig, parse_config
from pipeline.reference import scoring
from pipeline.ui.display import SilentDisplay
from tests.tiny import pairs

OTHER_TRIAL: dict[str, Any] = {
    "rl": "ipo",
    "rl_beta": 0.5,
    "learning_rate": 3e-4,
    "seed": 7,
    "gradient_accumulation_steps": 2,
    "adapter": "lora",
    "lora_r": 4,
    "sequence_len": 128,
    "tokens_per_forward": 200,
}
"""What a sweep may vary; with the seed, which rows are those of `val_set_size`."""


class Notes(SilentDisplay):
    """A display that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.usefixtures("ray_session")
def test_trials_on_the_same_data_score_once(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(30)))
    run_pool, forwards = scoring.run_pool, []

    def counting(*arguments: Any) -> Any:
        for result in run_pool(*arguments):
            forwards.append(result["forwards"])
            yield result

    monkeypatch.setattr(scoring, "run_pool", counting)

    def recipe(name: str, **keys: Any) -> RunConfig:
        defaults = {
            "base_model": tiny_base,
            "datasets": [{"path": str(tmp_path / "train.jsonl")}],
            "val_set_size": 6,
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "sequence_len": 256,
            "max_steps": 1,
            "save_strategy": "no",
            "output_dir": str(tmp_path / name),
        }
        return parse_config({**defaults, **keys})

    for name, keys in (("first", {}), ("other", OTHER_TRIAL)):
        display = Notes()
        metrics = train(recipe(name, **keys), display=display).metrics
        assert {"loss", "rewards/margins", "eval_rewards/margins"} <= set(metrics)
        manifests = sorted((tmp_path / "prepared" / "reference").glob("*/manifest.json"), key=lambda file: file.stat().st_mtime)
        assert len(manifests) == (1 if name == "first" else 2)
        assert sum(forwards) == sum(json.loads(file.read_text())["forwards"] for file in manifests) > 0
        how = f"{sum(forwards)} forwards" if name == "first" else "they were there already"
        assert f"reference log-probabilities of 30 rows: {manifests[-1].parent} ({how})" in display.notes
    third = score(recipe("third", rl_beta=0.3))
    assert (third.path, third.forwards) == (manifests[0].parent, 0)
