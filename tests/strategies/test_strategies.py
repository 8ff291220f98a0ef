"""What every strategy declares, reads and refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

import strategies
from strategies.config import as_config
from strategies.losses.table import loss_types
from strategies.methods.base import MethodKeys
from strategies.methods.dpo import DPOStrategy
from strategies.methods.grpo import TRLKeys
from strategies.methods.registry import STRATEGIES, BuiltInKeys, get_strategy
from tests.strategies.losses.pairs import TRL_LOSSES

BASE: dict[str, Any] = {"base_model": "tiny"}
REWARDS = {"trl": {"reward_funcs": ["tests.reward_functions.length"]}}


def config(rl: str, **keys: Any) -> Any:
    return as_config({**BASE, "rl": rl, **(REWARDS if rl == "grpo" else {}), **keys})


@pytest.mark.parametrize("rl", list(STRATEGIES))
def test_a_strategy_declares_everything_itself(rl: str) -> None:
    strategy = get_strategy(rl)
    for name in ("rl", "keys", "requires_reference", "batch_kind", "best_metric"):
        assert name in vars(strategy), name
    fields = {field.name for field in dataclasses.fields(strategy.get_training_args_class())}
    assert set(strategy.set_training_args_kwargs(config(rl))) <= fields
    assert strategy.get_trainer_class().batch_kind == strategy.batch_kind
    assert getattr(strategies, strategy.__name__) is strategy


def test_every_key_of_a_method_is_read_by_a_strategy() -> None:
    read = set().union(*(strategy.keys for strategy in STRATEGIES.values()))
    groups = BuiltInKeys.__bases__
    names = {name for group in groups for name in group.model_fields} - {"trl"}
    assert len(groups) == 7
    assert read == names - {"rl"} | {f"trl.{name}" for name in TRLKeys.model_fields}
    assert "rl_beta" in MethodKeys.model_fields


def test_only_simpo_and_orpo_need_no_reference() -> None:
    assert [rl for rl, strategy in STRATEGIES.items() if not strategy.requires_reference] == ["simpo", "orpo"]
    assert [STRATEGIES[rl].batch_kind for rl in ("dpo", "kto", "grpo")] == ["pair", "unpaired", "prompt"]


def test_an_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="rl: unknown strategy 'dop'; available: dpo, ipo, simpo, orpo, kto, grpo"):
        config("dop")


@pytest.mark.parametrize("loss", loss_types())
def test_every_loss_is_accepted(loss: str) -> None:
    smoothing = {"dpo_label_smoothing": 0.001} if loss == "exo_pair" else {}
    assert config("dpo", dpo_loss_type=[loss], **smoothing).dpo_loss_type == [loss]


def test_every_loss_of_trl_is_there_by_its_name() -> None:
    assert "sigmoid_norm" in TRL_LOSSES and set(loss_types()) >= TRL_LOSSES


def test_arguments_carry_only_the_keys_that_are_set() -> None:
    given = DPOStrategy.set_training_args_kwargs(config("dpo", rl_beta=0.3, dpo_ld_alpha=0.0, sequence_len=77))
    always = {"max_length": 77, "disable_dropout": True, "truncation_mode": "keep_start", "sample_packing": True}
    assert given == {"beta": 0.3, "ld_alpha": 0.0, **always}


@pytest.mark.parametrize(
    ("rl", "keys", "expected"),
    [
        ("ipo", {"dpo_ld_alpha": 0.5, "rpo_alpha": 0.2}, {"loss_type": ["ipo"], "ld_alpha": 0.5, "nll_alpha": 0.2}),
        ("simpo", {}, {"loss_type": ["simpo"], "beta": 2.0}),
        ("simpo", {"rl_beta": 2.5, "simpo_gamma": 0.0, "cpo_alpha": 1}, {"beta": 2.5, "simpo_gamma": 0.0, "nll_alpha": 1.0}),
        ("orpo", {"orpo_alpha": 0.3}, {"loss_type": ["orpo"], "beta": 0.3}),
        ("orpo", {"rl_beta": 0.4}, {"beta": 0.4}),
        ("kto", {"kto_desirable_weight": 0.0, "rl_beta": 0.2}, {"desirable_weight": 0.0, "beta": 0.2}),
        ("kto", {"kto_undesirable_weight": 1.5}, {"undesirable_weight": 1.5}),
        (
            "kto",
            {"trl": {"sync_ref_model": True, "ref_model_sync_steps": 5}},
            {"sync_ref_model": True, "ref_model_sync_steps": 5},
        ),
        (
            "dpo",
            {"dpo_f_divergence_type": "alpha_divergence", "dpo_f_alpha_divergence_coef": 0.3, "dpo_norm_loss": True},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "norm_loss": True},
        ),
        ("dpo", {"dpo_loss_type": ["discopop"], "dpo_discopop_tau": 0.1}, {"discopop_tau": 0.1}),
    ],
)
def test_keys_become_arguments(rl: str, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    given = get_strategy(rl).set_training_args_kwargs(config(rl, **keys))
    assert {name: given.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rl", "keys", "message"),
    [
        ("dpo", {"dpo_loss_type": ["sigmoid", "sigmoud"]}, r"dpo_loss_type\.1: unknown loss 'sigmoud'; available: sigmoid"),
        ("dpo", {"dpo_loss_type": ["simpo"]}, r"unknown loss 'simpo' \(simpo is a strategy: write rl: simpo\)"),
        (
            "dpo",
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0]},
            r"dpo_loss_weights: got 1 for 2 \(dpo_loss_type: sigmoid, sft\); give one per loss",
        ),
        ("dpo", {"dpo_loss_type": ["sft"], "dpo_loss_weights": [0.0]}, "dpo_loss_weights: all weights are 0, so nothing"),
        ("dpo", {"dpo_loss_type": ["sft"], "dpo_loss_weights": [-1.0]}, "dpo_loss_weights"),
        ("dpo", {"rl_beta": float("inf")}, "rl_beta"),
        ("dpo", {"dpo_loss_weights": [1.0]}, "dpo_loss_weights: has no effect without dpo_loss_type"),
        ("dpo", {"rl_beta": 0}, "rl_beta"),
        ("dpo", {"rl_beta": -1}, "rl_beta"),
        (
            "dpo",
            {"dpo_loss_type": ["hinge", "ipo"], "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing: has no effect with dpo_loss_type: hinge, ipo; it is read by sigmoid, exo_pair, robust, aot",
        ),
        ("dpo", {"dpo_loss_type": ["exo_pair"]}, "dpo_label_smoothing: dpo_loss_type: exo_pair needs it above 0"),
        ("dpo", {"dpo_loss_type": ["aot"], "dpo_use_weighting": True}, "dpo_use_weighting: can't weight the pairs of aot,"),
        ("dpo", {"dpo_discopop_tau": 0.1}, "dpo_discopop_tau: has no effect with dpo_loss_type: sigmoid; it is read by disc"),
        ("dpo", {"dpo_loss_type": ["sft"], "dpo_ld_alpha": 0.5}, "dpo_ld_alpha: has no effect with dpo_loss_type: sft"),
        ("dpo", {"dpo_loss_type": ["ipo"], "dpo_norm_loss": True}, "dpo_norm_loss: dpo_loss_type: ipo averages over the tok"),
        (
            "dpo",
            {"dpo_loss_type": ["sigmoid", "aot"], "dpo_f_divergence_type": "js_divergence"},
            "dpo_f_divergence_type: js_divergence is not defined for dpo_loss_type: aot; it is for sigmoid, hinge",
        ),
        (
            "dpo",
            {"dpo_f_alpha_divergence_coef": 0.3},
            "dpo_f_alpha_divergence_coef: has no effect without dpo_f_divergence_type: alpha_divergence",
        ),
        ("dpo", {"simpo_gamma": 1.0}, r"simpo_gamma: has no effect with rl: dpo \(it belongs to rl: simpo\); remove it"),
        ("ipo", {"dpo_loss_type": ["ipo"]}, r"dpo_loss_type: has no effect with rl: ipo \(it belongs to rl: dpo\)"),
        ("simpo", {"rpo_alpha": 1.0}, r"rpo_alpha: has no effect with rl: simpo \(it belongs to rl: dpo, ipo\)"),
        ("simpo", {"reference_model": "other"}, "reference_model: rl: simpo uses no reference model; remove the key"),
        ("orpo", {"reference_model": "other"}, "reference_model: rl: orpo uses no reference model; remove the key"),
        ("orpo", {"orpo_alpha": 0.1, "rl_beta": 0.1}, "orpo_alpha: is another name of rl_beta; keep one of them"),
        ("orpo", {"trl": {"sync_ref_model": True}}, r"trl\.sync_ref_model: has no effect with rl: orpo"),
        ("kto", {"kto_desirable_weight": -1.0}, "kto_desirable_weight"),
        (
            "kto",
            {"kto_desirable_weight": 0, "kto_undesirable_weight": 0},
            "kto_undesirable_weight: both weights are 0, so nothing would be learned",
        ),
        ("kto", {"truncation_mode": "keep_end"}, "truncation_mode: has no effect with rl: kto"),
        ("dpo", {"trl": {"sync_ref_model": True}, "adapter": "lora"}, r"trl\.sync_ref_model: the reference of an adapter is"),
        ("dpo", {"trl": {"ref_model_sync_steps": 3}}, r"trl\.ref_model_sync_steps: has no effect without trl\.sync_ref_mod"),
        ("dpo", {"trl": {"temperature": 0.9}}, r"trl\.temperature: has no effect with rl: dpo \(it belongs to rl: grpo\)"),
    ],
)
def test_contradictions_are_errors_with_the_key(rl: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(rl, **keys)


def test_the_strategies_load_without_torch() -> None:
    code = "import sys, strategies.methods.registry, strategies.config, strategies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
