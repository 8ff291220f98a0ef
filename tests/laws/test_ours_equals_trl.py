"""Law 6: on the same rows, seed and batches our trainer and TRL's have the same losses and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tests.laws.runs import losses, trained
from tests.tiny import pairs, tiny_model, tiny_tokenizer

METRICS = (
    "loss grad_norm learning_rate entropy logits/chosen logits/rejected mean_token_accuracy num_tokens rewards/chosen "
    "rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
).split()


def trl_trained(folder: Path, **arguments: Any) -> DPOTrainer:
    tokenizer = tiny_tokenizer()
    args = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=128,
        num_train_epochs=1,
        seed=42,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        average_tokens_across_devices=False,
        disable_tqdm=True,
        **arguments,
    )
    # The placeholder reference has the policy's weights, as our frozen copy has.
    trainer = DPOTrainer(
        tiny_model(tokenizer),
        tiny_model(tokenizer),
        args,
        train_dataset=Dataset.from_list(pairs(16)),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("keys", "arguments"),
    [
        ({}, {}),
        ({"dpo_ld_alpha": 0.5, "rl_beta": 0.3}, {"ld_alpha": 0.5, "beta": 0.3}),
        ({"dpo_use_weighting": True}, {"use_weighting": True}),
        (
            {"dpo_loss_type": ["hinge", "sft"], "dpo_loss_weights": [1.0, 0.2]},
            {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.2]},
        ),
    ],
    ids=["sigmoid", "ld_alpha", "weighting", "left_to_trl"],
)
def test_same_losses_and_metrics_as_trl(tmp_path: Path, keys: dict[str, Any], arguments: dict[str, Any]) -> None:
    ours = trained(tmp_path / "ours", rows=pairs(16), micro_batch_size=2, warmup_steps=0, **keys)
    theirs = trl_trained(tmp_path / "trl", **arguments)
    assert len(losses(ours)) == 8
    for name in METRICS:
        assert losses(ours, name) == pytest.approx(losses(theirs, name), rel=1e-4, abs=1e-6), name
    assert losses(ours)[-1] < losses(ours)[0]
