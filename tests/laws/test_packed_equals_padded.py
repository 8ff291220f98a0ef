"""Law 1: packed rows and padded batches are the same training: every logged number, and every gradient.

Weights are so large that a token's distribution depends on all that it sees (`opinionated`): a mask, a position or a label
that is off by one shows in the first digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.runs import FAMILIES, LORA, built, losses, opinionated, same_history, trained
from tests.tiny import prepared_pairs

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"rl": "ipo"},
    "simpo": {"rl": "simpo", "cpo_alpha": 0.1},
    "orpo": {"rl": "orpo"},
}
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
ONE_PAIR_EACH = 50
"""Tokens of a forward that takes any one of the pairs below, and no two of them."""
EDGES = [
    {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]},
    {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6, 7]},
    {"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 9]},
    {"prompt_ids": [*range(20)], "chosen_ids": [7] * 30, "rejected_ids": [9, 10]},
]
STEPS = {"micro_batch_size": 4, "eval_steps": 2, "eval_rows": 5, "eval_on_start": True}


def both(folder: Path, family: str = "llama", model: dict[str, Any] | None = None, **keys: Any) -> tuple[Any, Any]:
    """The same run packed and padded."""
    packed, padded = (
        trained(folder / name, model=opinionated(family, **(model or {})), sample_packing=packing, **{**STEPS, **keys})
        for name, packing in (("packed", True), ("padded", False))
    )
    assert packed.packed and packed.padded_because is None
    assert not padded.packed
    return packed, padded


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_and_padded_runs_log_the_same(tmp_path: Path, family: str, adapter: str, loss: str) -> None:
    packed, padded = both(tmp_path, family, **ADAPTERS[adapter], **LOSSES[loss])
    same_history(packed, padded)
    logged = set().union(*packed.state.log_history)
    for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy"):
        assert {name, f"eval_{name}"} <= logged
    assert {"loss", "eval_loss", "grad_norm", "num_tokens"} <= logged
    # The law would hold, too, of runs that do nothing.
    assert abs(losses(packed)[-1] - losses(packed)[0]) > 1e-2


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing_lora": {"gradient_checkpointing": True, **LORA},
    "accumulation": {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
    "a_forward_each": {"tokens_per_forward": ONE_PAIR_EACH},
    "padded_rows": {"pad_to_multiple_of": 64},
    "edges": {"rows": [*prepared_pairs(9), *EDGES], "eval_rows": [*EDGES, *prepared_pairs(3)]},
    "truncated": {"sequence_len": 22, "dpo_norm_loss": True},
    "truncated_at_the_beginning": {"sequence_len": 22, "truncation_mode": "keep_end"},
    "truncated_in_the_prompt": {"sequence_len": 14, "rpo_alpha": 0.5},
    "aot": {"dpo_loss_type": ["aot"], "tokens_per_forward": ONE_PAIR_EACH},
    "aot_unpaired": {"dpo_loss_type": ["aot_unpaired"], "tokens_per_forward": 2 * ONE_PAIR_EACH},
    "sft": {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.3], "tokens_per_forward": ONE_PAIR_EACH},
    "ld_alpha": {"dpo_ld_alpha": 0.4},
    "weighting": {"dpo_use_weighting": True},
    "weighting_sft": {"dpo_use_weighting": True, "dpo_loss_type": ["sigmoid", "sft"]},
    "rpo_alpha": {"rpo_alpha": 0.5},
    "norm_loss": {"dpo_norm_loss": True},
    "saved_head": {**LORA, "lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head"]},
    "synced": {"trl": {"sync_ref_model": True, "ref_model_sync_steps": 2}},
    "an_epoch_that_does_not_divide": {"rows": prepared_pairs(13), "num_epochs": 1.5},
}
COUPLED = ("aot", "aot_unpaired", "sft", "weighting_sft")


@pytest.mark.parametrize("name", list(OPTIONS))
def test_packed_and_padded_runs_log_the_same_with(tmp_path: Path, name: str) -> None:
    # Padded forwards of one pair: only the global batch tells coupled losses what to compare.
    shape = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "eval_batch_size": 3} if name in COUPLED else {}
    keys = {**shape, **OPTIONS[name]}
    packed = trained(tmp_path / "packed", model=opinionated(), **{**STEPS, **keys})
    keys.pop("tokens_per_forward", None)
    padded = trained(tmp_path / "padded", model=opinionated(), sample_packing=False, **{**STEPS, **keys})
    assert packed.packed and not padded.packed
    same_history(packed, padded)


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_run_in_bfloat16_stays_within_its_precision(tmp_path: Path, family: str, adapter: str) -> None:
    """Products round to 8 bits, and sums of other lengths round in another order.

    A completion's log-probability of some 80 nats is then off by some hundredths, its reward by beta = 0.1 times that.
    """
    packed, padded = both(tmp_path, family, bf16=True, **ADAPTERS[adapter])
    assert losses(packed, "num_tokens") == losses(padded, "num_tokens")
    tolerances = {"loss": (2e-2, 5e-3), "rewards/margins": (1e-2, 1e-2), "grad_norm": (3e-2, 0.0), "entropy": (2e-3, 0.0)}
    for name, (rel, absolute) in {**tolerances, "logps/chosen": (3e-3, 0.0), "logps/rejected": (3e-3, 0.0)}.items():
        assert losses(packed, name) == pytest.approx(losses(padded, name), rel=rel, abs=absolute), name


def gradients(folder: Path, family: str, packing: bool, **keys: Any) -> dict[str, torch.Tensor]:
    """Of the first batch, by a policy that has left its reference: at the reference itself many losses are symmetric."""
    trainer = built(folder, model=opinionated(family), sample_packing=packing, micro_batch_size=8, **keys)
    trainer.starts_at_reference = False  # the policy is moved
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    return {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("loss", "budget"), [(name, None) for name in LOSSES] + [("sigmoid", ONE_PAIR_EACH), ("aot", ONE_PAIR_EACH)]
)
@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_gradient_is_the_same(tmp_path: Path, family: str, adapter: str, loss: str, budget: int | None) -> None:
    """Each element to 1e-4 of itself, or to 1e-5 of the largest of its matrix: smaller ones are what is left of sums."""
    keys = {**ADAPTERS[adapter], **LOSSES.get(loss, {"dpo_loss_type": [loss]})}
    packed = gradients(tmp_path, family, True, **keys, tokens_per_forward=budget)
    padded = gradients(tmp_path, family, False, **keys)
    overall = max(gradient.abs().max() for gradient in padded.values())
    assert packed.keys() == padded.keys() and overall > 1e-3
    for name, gradient in padded.items():
        # Some are 0 up to rounding as a whole, as GPT-2's key biases are.
        smallest = max(1e-5 * gradient.abs().max().item(), 1e-6 * overall.item())
        torch.testing.assert_close(
            packed[name], gradient, rtol=1e-4, atol=smallest, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_model_that_cannot_pack_trains_padded_and_says_why(tmp_path: Path) -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    asked, padded = (
        trained(tmp_path, model=opinionated("qwen", **sliding), sample_packing=packing, **STEPS) for packing in (True, False)
    )
    assert asked.padded_because == "its attention window of 16 tokens is shorter than sequences of 128"
    assert padded.padded_because is None
    same_history(asked, padded, rel=1e-7, absolute=0.0)


def test_packed_runs_feed_fewer_tokens(tmp_path: Path) -> None:
    packed, padded = both(tmp_path)
    fed = [next(entry["total_flos"] for entry in run.state.log_history if "total_flos" in entry) for run in (packed, padded)]
    assert fed[0] < 0.7 * fed[1]
