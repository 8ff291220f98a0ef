"""Keys of grpo: what they become, what contradicts, which batches hold whole groups."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from trl import GRPOConfig

from strategies.config import as_config
from strategies.methods.grpo import GRPOStrategy
from strategies.methods.grpo_rules import NUM_GENERATIONS
from tests import reward_functions

REWARDS = ["tests.reward_functions.low_tokens"]


def config(**keys: Any) -> Any:
    trl = {"reward_funcs": REWARDS, **keys.pop("trl", {})}
    return as_config({"base_model": "tiny", "rl": "grpo", "trl": trl, **keys})


# Keys


def test_arguments_carry_the_keys_that_are_set() -> None:
    trl = {"num_generations": 4, "top_k": 0, "scale_rewards": False, "reward_weights": [2.0], "loss_type": "grpo"}
    found = GRPOStrategy.set_training_args_kwargs(config(rl_beta=0.04, micro_batch_size=3, trl=trl))
    assert found == {"beta": 0.04, "disable_dropout": True, "per_device_eval_batch_size": 4, **trl}


def test_beta_is_written_in_either_place() -> None:
    assert not GRPOStrategy.uses_reference(config())
    assert GRPOStrategy.beta(config(trl={"beta": 0.0})) == 0
    assert GRPOStrategy.beta(config(trl={"beta": 0.1})) == GRPOStrategy.beta(config(rl_beta=0.1)) == 0.1
    assert GRPOStrategy.uses_reference(config(trl={"beta": 0.1}, rl_beta=0.1, reference_model="other"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trl": {"reward_funcs": []}}, "trl.reward_funcs: grpo learns from reward functions and none is given; write"),
        (
            {"trl": {"reward_weights": [1, 2]}},
            "trl.reward_weights: got 2 for 1 .trl.reward_funcs.; give one per function",
        ),
        ({"trl": {"beta": 0.1}, "rl_beta": 0.2}, "trl.beta: 0.1 contradicts rl_beta: 0.2"),
        ({"trl": {"beta": 0.0}, "rl_beta": 0.2}, "trl.beta: 0 contradicts rl_beta: 0.2"),
        ({"trl": {"use_bias_correction_kl": True}}, "trl.use_bias_correction_kl: has no effect without"),
        (
            {"trl": {"num_completions_to_print": 2}},
            "has no effect without trl.log_completions: true",
        ),
        ({"trl": {"entropy_target": 2}}, "trl.entropy_target: has no effect without trl.use_adaptive_entropy: true"),
        (
            {"trl": {"entropy_coef": 0.1, "entropy_coef_max": 2}},
            "trl.entropy_coef_max: has no effect without",
        ),
        ({"trl": {"vllm_mode": "server"}}, "trl.vllm_mode: has no effect without trl.use_vllm: true"),
        ({"vllm": {"port": 1}}, "vllm: has no effect without trl.use_vllm: true"),
        (
            {"trl": {"use_vllm": True, "vllm_server_port": 1}},
            "vllm_server_port: has no effect with trl.vllm_mode: colocate",
        ),
        (
            {"trl": {"use_vllm": True, "vllm_mode": "server"}, "vllm": {"max_model_len": 9}},
            "vllm.max_model_len: has no effect with trl.vllm_mode: server; it is read by colocate",
        ),
        (
            {"trl": {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 1}, "vllm": {"port": 2}},
            "vllm.port: 2 contradicts trl.vllm_server_port: 1",
        ),
        (
            {"trl": {"use_vllm": True, "vllm_importance_sampling_clip_min": 3}},
            "trl.vllm_importance_sampling_clip_min: 3 must be below the greatest ratio, 3",
        ),
        (
            {"trl": {"use_vllm": True, "loss_type": "vespo"}},
            "trl.vllm_importance_sampling_mode: loss_type: vespo",
        ),
        (
            {"trl": {"loss_type": "sapo", "epsilon": 0.1}},
            "trl.epsilon: has no effect with trl.loss_type: sapo",
        ),
        (
            {"trl": {"scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum"}},
            "trl.scale_rewards: has no effect with trl.multi_objective_aggregation: normalize_then_sum",
        ),
        (
            {"trl": {"steps_per_generation": 2, "generation_batch_size": 8}},
            "trl.steps_per_generation: contradicts trl.generation_batch_size",
        ),
        ({"include_tokens_per_second": True}, "include_tokens_per_second: has no effect with rl: grpo"),
        ({"trl": {"sync_ref_model": True}}, "trl.sync_ref_model: rl: grpo with beta 0 uses no reference model"),
        ({"dpo_generate_during_eval": True}, "dpo_generate_during_eval: has no effect with rl: grpo"),
        ({"trl": {"num_generations": 1}}, r"trl.num_generations\n.*greater than or equal to 2"),
        ({"trl": {"loss_type": "sigmoid"}}, r"trl.loss_type\n.*'grpo'"),
        ({"trl": {"async_prefetch": True}}, r"trl.async_prefetch\n.*not permitted"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**keys)


def test_without_the_section_rewards_are_missed() -> None:
    with pytest.raises(ValueError, match="trl.reward_funcs: grpo learns from reward functions and none is given"):
        as_config({"base_model": "tiny", "rl": "grpo"})
    with pytest.raises(ValueError, match="trl.num_generations: has no effect with rl: dpo .it belongs to rl: grpo.; remove it"):
        as_config({"base_model": "tiny", "rl": "dpo", "trl": {"num_generations": 4}})


def test_vllm_must_be_installed_where_it_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(trl={"use_vllm": True, "vllm_guided_decoding_regex": "a+"}, vllm={"max_model_len": 99})
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="trl.use_vllm: the package vllm is not installed here; install it"):
        GRPOStrategy.set_trainer_kwargs(cfg)
    monkeypatch.setattr("strategies.methods.grpo.find_spec", lambda name: ModuleSpec(name, None))
    (reward,) = GRPOStrategy.set_trainer_kwargs(cfg)["reward_funcs"]
    assert inspect.unwrap(reward) is reward_functions.low_tokens
    found = GRPOStrategy.set_training_args_kwargs(cfg)
    assert (found["use_vllm"], found["vllm_structured_outputs_regex"], found["vllm_max_model_length"]) == (True, "a+", 99)


# Batches


@pytest.mark.parametrize(
    ("keys", "world_size", "message"),
    [
        (
            {},
            1,
            r"trl.num_generations: 8 must divide the generation batch, micro_batch_size \(1\) x workers \(1\) x "
            r"gradient_accumulation_steps \(1\) = 1, .* set gradient_accumulation_steps: 8$",
        ),
        ({"micro_batch_size": 3, "gradient_accumulation_steps": 5}, 1, "= 15, .* set gradient_accumulation_steps: 8$"),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 5}, 2, "= 20, .* set gradient_accumulation_steps: 6$"),
        ({"trl": {"steps_per_generation": 3}, "micro_batch_size": 4}, 1, "= 12, .* set steps_per_generation: 4$"),
        (
            {"trl": {"generation_batch_size": 20, "num_generations": 4}, "micro_batch_size": 3},
            2,
            r"trl.generation_batch_size: 20 must be a multiple of micro_batch_size \(3\) x workers \(2\) and of "
            r"num_generations \(4\); set generation_batch_size: 24$",
        ),
        (
            {"micro_batch_size": 8, "eval_batch_size": 3},
            2,
            r"eval_batch_size: eval_batch_size \(3\) x workers \(2\) must be a multiple of num_generations \(8\); "
            "set eval_batch_size: 4, or remove it$",
        ),
    ],
)
def test_batches_that_hold_no_whole_groups(keys: dict[str, Any], world_size: int, message: str) -> None:
    (problem,) = GRPOStrategy.find_batch_problems(config(**keys), world_size)
    with pytest.raises(ValueError, match=message):
        raise ValueError(": ".join(problem))


@pytest.mark.parametrize(
    ("keys", "world_size"),
    [
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 2}, 1),
        ({"gradient_accumulation_steps": 4}, 2),
        ({"micro_batch_size": 8, "eval_batch_size": 3, "eval_strategy": "no"}, 1),
        ({"micro_batch_size": 8, "eval_batch_size": 4}, 2),
        ({"micro_batch_size": 2, "trl": {"generation_batch_size": 24}}, 4),
    ],
)
def test_batches_that_hold_whole_groups(keys: dict[str, Any], world_size: int) -> None:
    assert list(GRPOStrategy.find_batch_problems(config(**keys), world_size)) == []


def test_the_defaults_that_the_rules_know_are_trls() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert fields["num_generations"] == NUM_GENERATIONS
    assert (fields["loss_type"], fields["vllm_mode"]) == ("dapo", "colocate")
    assert (fields["epsilon"], fields["beta"], fields["num_iterations"]) == (0.2, 0.0, 1)
    assert fields["vllm_importance_sampling_clip_max"] == 3.0
    assert fields["vllm_importance_sampling_mode"] == "sequence_mask"
    assert fields["scale_rewards"] == "group"


@pytest.mark.parametrize(
    ("trl", "message"),
    [
        ({"reward_weights": [0.0]}, r"trl\.reward_weights: all weights are 0"),
        ({"delta": 0.5}, r"trl\.delta: 0\.5 must be above 1 \+ epsilon, 1\.2"),
        ({"temperature": float("inf")}, r"temperature"),
    ],
)
def test_numbers_that_would_teach_nothing(trl: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_config({"base_model": "tiny", "rl": "grpo", "trl": {"reward_funcs": ["tests.reward_functions.length"], **trl}})
