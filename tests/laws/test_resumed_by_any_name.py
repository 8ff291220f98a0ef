"""Law 4 for models whose files name weights otherwise than the model: resumed == never stopped, and the best is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from strategies import HFRLTrainerBuilder
from tests.laws.runs import CONFIG
from tests.tiny import SIZE, pairs, seeded, tiny_tokenizer
from tests.tiny_vision import llava, picture_pairs


def mixtral() -> Any:
    tokenizer = tiny_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = MixtralConfig(**{**SIZE, **tokens, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None})
    return seeded(MixtralForCausalLM, config)


def run(folder: Path, family: str, resume: Path | None = None, **given: Any) -> Any:
    keys: dict[str, Any] = {**CONFIG, "output_dir": str(folder), "sequence_len": 512, "max_steps": 4, "micro_batch_size": 2}
    keys |= {"lr_scheduler": "constant", "warmup_steps": 0, **given}
    if family == "llava":
        vision, rows = llava(), picture_pairs(8)
        builder = HFRLTrainerBuilder(keys, vision.model, vision.processor.tokenizer, vision.processor)
    else:
        rows = pairs(8)
        builder = HFRLTrainerBuilder(keys, mixtral(), tiny_tokenizer())
    builder.train_dataset = rows
    builder.eval_dataset = rows[:2] if "eval_steps" in given else None
    trainer = builder.build()
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def assert_same(one: Any, other: Any) -> None:
    for (name, left), (_, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_resumed_equals_never_stopped(tmp_path: Path, family: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", family, **saving)
    resumed = run(tmp_path / "resumed", family, resume=tmp_path / "whole" / "checkpoint-2", **saving)
    assert_same(whole.model, resumed.model)


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_the_best_model_is_that_of_its_checkpoint(tmp_path: Path, family: str) -> None:
    """Here the first one, since the others get worse."""
    choosing = {"save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "rewards/margins"}
    chosen = run(tmp_path / "a", family, save_strategy="steps", greater_is_better=False, **choosing)
    assert Path(chosen.state.best_model_checkpoint).name == "checkpoint-2"
    assert_same(chosen.model, run(tmp_path / "b", family, max_steps=2).model)
