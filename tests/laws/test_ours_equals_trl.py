"""Law 6: on the same rows, seed and batches our trainers and TRL's have the same losses and metrics.

Where TRL departs from the paper (conservative DPO, ORPO's likelihood term) `test_ours_equals_the_formula.py` compares
with the formula; here the rows of ORPO are such that both agree.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, ModelConfig
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from pipeline.config.peers import TOOLS
from strategies.batch.kto_sampler import MismatchedSampler
from strategies.batch.plan import BatchPlan
from strategies.losses.table import loss_types
from tests.laws.runs import LORA, losses, trained
from tests.strategies.losses.pairs import TRL_LOSSES
from tests.tiny import labelled, pairs, tiny_model, tiny_tokenizer

COMMON = "loss grad_norm learning_rate logps/chosen logps/rejected rewards/chosen rewards/rejected rewards/margins".split()
PAIR_METRICS = [
    *COMMON,
    *"entropy logits/chosen logits/rejected mean_token_accuracy num_tokens rewards/accuracies".split(),
]
KTO_METRICS = [*COMMON, *"kl entropy logits/chosen logits/rejected num_tokens".split()]
ONE_TOKEN_PROMPTS = [{**pair, "prompt": f"{row % 10}"} for row, pair in enumerate(pairs(16))]

DPO_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{loss: ({"dpo_loss_type": [loss]}, {"loss_type": [loss]}) for loss in loss_types() if loss in TRL_LOSSES - {"exo_pair"}},
    "ld_alpha": ({"dpo_ld_alpha": 0.5, "rl_beta": 0.3}, {"ld_alpha": 0.5, "beta": 0.3}),
    "weighting": ({"dpo_use_weighting": True}, {"use_weighting": True}),
    "several": (
        {"dpo_loss_type": ["hinge", "sft"], "dpo_loss_weights": [1.0, 0.2]},
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.2]},
    ),
    "discopop_tau": (
        {"dpo_loss_type": ["discopop"], "dpo_discopop_tau": 0.5},
        {"loss_type": ["discopop"], "discopop_tau": 0.5},
    ),
    **{
        f"{loss}_smoothed": (
            {"dpo_loss_type": [loss], "dpo_label_smoothing": 0.1},
            {"loss_type": [loss], "label_smoothing": 0.1},
        )
        for loss in ("exo_pair", "robust", "aot", "aot_unpaired")
    },
    **{
        divergence: ({"dpo_f_divergence_type": divergence}, {"f_divergence_type": divergence})
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "alpha_of_ipo": (
        {
            "dpo_loss_type": ["ipo"],
            "dpo_f_divergence_type": "alpha_divergence",
            "dpo_f_alpha_divergence_coef": 0.3,
        },
        {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
}


def arguments(folder: Path, steps: int = 5, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_length": 128,
        "max_steps": steps,
        "seed": 42,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "average_tokens_across_devices": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        **more,
    }


def same(ours: Any, theirs: Any, metrics: list[str], steps: int = 5) -> None:
    assert len(losses(ours)) == steps
    for name in metrics:
        # The KL term is a difference of summed log-probabilities: what is left of their rounding.
        least = 2e-5 if name == "kl" else 2e-6
        assert losses(ours, name) == pytest.approx(losses(theirs, name), rel=1e-4, abs=least), name


@pytest.mark.parametrize("name", list(DPO_RUNS))
def test_dpo(tmp_path: Path, name: str) -> None:
    keys, given = DPO_RUNS[name]
    ours = trained(tmp_path / "ours", rows=pairs(16), micro_batch_size=2, warmup_steps=0, max_steps=5, **keys)
    tokenizer = tiny_tokenizer()
    # The second model has the policy's weights, as our frozen copy has.
    theirs = DPOTrainer(
        tiny_model(tokenizer),
        tiny_model(tokenizer),
        DPOConfig(**arguments(tmp_path / "trl", **given)),
        train_dataset=Dataset.from_list(pairs_in_our_order(pairs(16))),
        processing_class=tokenizer,
    )
    theirs.train()
    same(ours, theirs, PAIR_METRICS)


def pairs_in_our_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as our first epoch takes them, whatever the size of a batch."""
    return [rows[row] for row in BatchPlan(len(rows), 1, seed=42).order(epoch=0)]


def in_our_order(rows: list[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """The rows as KTO's first epoch takes them: TRL's trainer, which doesn't shuffle, needs them in this order."""
    return [rows[row] for row, _ in MismatchedSampler(len(rows), block, seed=42)]


@pytest.mark.parametrize(
    ("keys", "given"),
    [
        ({}, {}),
        (
            {"rl_beta": 0.3, "kto_desirable_weight": 1.5, "kto_undesirable_weight": 0.5},
            {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        ),
        (LORA, {}),
    ],
    ids=["plain", "weights", "lora"],
)
def test_kto(tmp_path: Path, keys: dict[str, Any], given: dict[str, Any]) -> None:
    rows = labelled(20)
    ours = trained(tmp_path / "ours", rows=rows, rl="kto", micro_batch_size=4, warmup_steps=0, max_steps=5, **keys)
    tokenizer = tiny_tokenizer()
    adapter = {"peft_config": ours.model.peft_config["default"]} if keys is LORA else {"ref_model": tiny_model(tokenizer)}
    theirs = KTOTrainer(
        tiny_model(tokenizer),
        args=KTOConfig(**arguments(tmp_path / "trl", **{"per_device_train_batch_size": 4, **given})),
        train_dataset=Dataset.from_list(in_our_order(rows, block=4)),
        processing_class=tokenizer,
        **adapter,
    )
    theirs.train()
    same(ours, theirs, KTO_METRICS)
    # The term is at work: from the second step on the policy has left the reference.
    assert max(losses(ours, "kl")) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_simpo(tmp_path: Path, alpha: float) -> None:
    """TRL's likelihood term is a mean over the tokens of a batch, ours over its pairs: the same for batches of one."""
    keys = {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": alpha, "micro_batch_size": 1}
    ours = trained(tmp_path / "ours", rows=pairs(16), warmup_steps=0, max_steps=5, **keys)
    tokenizer = tiny_tokenizer()
    given = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": alpha, "per_device_train_batch_size": 1}
    theirs = CPOTrainer(
        tiny_model(tokenizer),
        CPOConfig(**arguments(tmp_path / "trl", **given)),
        train_dataset=Dataset.from_list(pairs_in_our_order(pairs(16))),
        processing_class=tokenizer,
    )
    theirs.train()
    same(ours, theirs, ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"])
    if alpha:
        same(ours, theirs, ["nll_loss"])


def test_orpo(tmp_path: Path) -> None:
    """TRL's likelihood term counts the prompt too, and tokens instead of pairs: the same for one-token prompts, one a batch."""
    rows = ONE_TOKEN_PROMPTS
    ours = trained(tmp_path / "ours", rows=rows, rl="orpo", rl_beta=0.5, micro_batch_size=1, warmup_steps=0, max_steps=5)
    tokenizer = tiny_tokenizer()
    theirs = ORPOTrainer(
        tiny_model(tokenizer),
        ORPOConfig(**arguments(tmp_path / "trl", beta=0.5, per_device_train_batch_size=1)),
        train_dataset=Dataset.from_list(pairs_in_our_order(rows)),
        processing_class=tokenizer,
    )
    theirs.train()
    same(ours, theirs, ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"])


def test_the_rows_of_trls_kto_are_not_shuffled(tmp_path: Path) -> None:
    """What `in_our_order` relies on."""
    tokenizer = tiny_tokenizer()
    trainer = KTOTrainer(
        tiny_model(tokenizer),
        tiny_model(tokenizer),
        KTOConfig(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(labelled(4)),
        processing_class=tokenizer,
    )
    assert isinstance(trainer._get_train_sampler(trainer.train_dataset), SequentialSampler)


def test_a_converted_recipe_has_trls_defaults() -> None:
    """Of the version that is installed: what a recipe of TRL's doesn't say."""
    trl = TOOLS["TRL"]
    theirs = {field.name: field.default for one in (DPOConfig, ModelConfig) for field in dataclasses.fields(one)}
    given = {**trl.defaults, **trl.adapter_defaults}
    names = {ours: name for name, ours in trl.names.items() if name in theirs}
    ours = {names.get(name, name): value for name, value in given.items() if name != "excess_length_strategy"}
    assert ours == {name: getattr(theirs[name], "value", theirs[name]) for name in ours}
