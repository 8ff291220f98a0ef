"""Answers to a few prompts at each evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import prepared_pairs, save_tiny


@pytest.mark.parametrize("keys", [{}, {"adapter": "lora"}, {"reference_model": "other"}], ids=["full", "lora", "explicit"])
def test_answers_are_written_at_each_evaluation(build: Callable[..., Any], tmp_path: Path, keys: dict[str, Any]) -> None:
    if "reference_model" in keys:
        keys = {"reference_model": save_tiny(tmp_path / "other", seed=9)}
    rows = prepared_pairs(6 if not keys else 2)
    trainer = build(
        4, learning_rate=1e-2, dpo_generate_during_eval=True, eval_on_start=True, eval_steps=4, evaluate=rows, **keys
    )
    assert trainer.eval_generations.max_new_tokens == 64
    trainer.eval_generations.max_new_tokens = 16
    trainer.train()
    folder = Path(trainer.args.output_dir) / "generations"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000.jsonl", "step-000004.jsonl"]
    start, end = ([json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.iterdir()))
    assert [row["prompt"] for row in start] == [row["prompt"] for row in rows[:4]]  # of four at most
    same_at_start = "reference_model" not in keys
    assert all((row["policy"] == row["reference"]) == same_at_start for row in start)
    assert [row["reference"] for row in end] == [row["reference"] for row in start]
    assert any(row["policy"] != row["reference"] for row in end)
    assert trainer.generations == end
    lengths = [entry["eval_answer_length"] for entry in trainer.state.log_history if "eval_answer_length" in entry]
    assert len(lengths) == 2 and all(0 < length <= 16 for length in lengths)


def test_generating_leaves_the_training_as_it_was(build: Callable[..., Any]) -> None:
    losses = []
    for generate in (False, True):
        trainer = build(
            4,
            adapter="lora",
            lora_dropout=0.1,
            dpo_generate_during_eval=generate,
            eval_steps=2,
            evaluate=prepared_pairs(2),
        )
        if generate:
            trainer.eval_generations.max_new_tokens = 16
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
