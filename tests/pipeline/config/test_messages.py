"""Every wrong recipe gets messages that name the key, say what is allowed, and come all at once."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigError

GOOD: dict[str, Any] = {"base_model": "model", "datasets": [{"path": "pairs.jsonl"}]}


def searched(**keys: Any) -> dict[str, Any]:
    """Keys of a sweep."""
    return {"val_set_size": 4, "tune": {"space": {"learning_rate": {"choice": [1e-4]}}, **keys}}


def problems(**keys: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_config({**GOOD, **keys})
    return dict(caught.value.problems)


@pytest.mark.parametrize(
    ("keys", "path", "message"),
    [
        ({"rl_bta": 0.1}, "rl_bta", "unknown key; did you mean 'rl_beta'?"),
        ({"qqqqqq": 1}, "qqqqqq", "unknown key; `prefray schema` lists every key"),
        ({"datasets": [{"path": "a", "typ": "x"}]}, "datasets.0.typ", "unknown key; did you mean 'type'?"),
        ({"ray": {"num_worker": 2}}, "ray.num_worker", "unknown key; did you mean 'num_workers'?"),
        ({"datasets": [{"path": "a", "type": {"field_promt": "q"}}]}, "datasets.0.type.field_promt", "'field_prompt'"),
        ({"rl_beta": -1}, "rl_beta", "must be greater than 0, got -1"),
        ({"micro_batch_size": "many"}, "micro_batch_size", "must be a whole number, got 'many'"),
        ({"eval_steps": "often", "val_set_size": 4}, "eval_steps", "got 'often'"),
        ({"datasets": []}, "datasets", "should have at least 1 item"),
        ({"dpo_loss_type": 3}, "dpo_loss_type", "must be a list, got 3"),
        ({"profile": True}, "profile", "must be a mapping, got True"),
        (searched(share_base="maybe"), "tune.share_base", "must be 'auto' or true or false, got 'maybe'"),
        (searched(finalists=3), "tune.finalists", "must be a mapping, got 3"),
        ({"profile": {"steps": "x"}}, "profile.steps", "must be a list, got 'x'"),
        ({"profile": {"steps": [3]}}, "profile.steps.1", "is missing: the list has too few items, got [3]"),
        ({"profile": {"steps": [3, 6, 9]}}, "profile.steps", "must have at most 2 items, got [3, 6, 9]"),
        ({"image_size": "big"}, "image_size", "must be a whole number or a list, got 'big'"),
        ({"val_set_size": 2.5}, "val_set_size", "must be whole, got 2.5"),
        ({"rl": "ppo"}, "rl", "unknown value 'ppo'; available: dpo, ipo, simpo, orpo, kto, grpo"),
        ({"chat_template": "vicuna"}, "chat_template", "unknown template 'vicuna'; built in: chatml"),
        ({"optimizer": "adam"}, "optimizer", "unknown optimizer 'adam'; available: adafactor"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler", "unknown lr_scheduler 'cosin'; available: rex, one_cycle, constant"),
        ({"datasets": [{"path": "a", "type": "chatml.intell"}]}, "datasets.0.type", "did you mean chatml.intel"),
        ({"chat_template": "jinja"}, "chat_template", "jinja needs chat_template_jinja"),
    ],
)
def test_a_wrong_value(keys: dict[str, Any], path: str, message: str) -> None:
    found = problems(**keys)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("keys", "path", "reason"),
    [
        ({"min_sample_len": 64}, "min_sample_len", "write `sequence_len`"),
        ({"push_to_hub": True}, "push_to_hub", "write `hub_model_id`"),
        ({"ebft": {"mode": "strided"}}, "ebft", "a strategy that is not available"),
        ({"datasets": [{"path": "a", "shards": 4}]}, "datasets.0.shards", "no meaning for the rows of a preference dataset"),
        ({"deepspeed": "ds_zero2.json"}, "deepspeed", "there is no file 'ds_zero2.json'"),
        ({"use_ray": False}, "use_ray", "runs are always on Ray here"),
    ],
)
def test_a_key_of_axolotls_that_is_not_supported(keys: dict[str, Any], path: str, reason: str) -> None:
    assert reason in problems(**keys)[path]


@pytest.mark.parametrize(
    ("keys", "path", "reason"),
    [
        ({"lora_r": 8}, "lora_r", "no effect without an adapter"),
        ({"lora_model_dir": "a", "adapter": "lora", "lora_r": 8}, "lora_r", "no effect with lora_model_dir"),
        ({"rl": "kto", "datasets": [{"path": "a", "field_chosen": "c"}]}, "datasets.0.field_chosen", "and rl: kto"),
        (
            {"datasets": [{"path": "a", "split_pairs": True}]},
            "datasets.0.split_pairs",
            "has no effect with rl: dpo; it makes labelled answers, for rl: kto",
        ),
        (
            {
                "rl": "kto",
                "datasets": [{"path": "a", "type": "chat_template.default", "field_label": "l", "split_pairs": True}],
            },
            "datasets.0.field_label",
            "and rl: kto with split_pairs",
        ),
        (
            {"rl": "grpo", "datasets": [{"path": "a", "chat_template": "chatml"}]},
            "datasets.0.chat_template",
            "no effect with type: (not set) and rl: grpo; it belongs to chat_template.default",
        ),
        (
            {"rl": "grpo", "datasets": [{"path": "a", "type": "chat_template.default", "field_chosen": "c"}]},
            "datasets.0.field_chosen",
            "and rl: grpo",
        ),
        ({"datasets": [{"path": "a", "type": "chatml.intel", "field_prompt": "q"}]}, "datasets.0.field_prompt", "as a mapping"),
        (
            {"datasets": [{"path": "a", "type": {"field_prompt": "q"}, "field_system": "s"}]},
            "datasets.0.field_system",
            "mapping",
        ),
        ({"optim_args": {"amsgrad": True}}, "optim_args", "no effect with optimizer: adamw_torch"),
        ({"optimizer": "sgd", "adam_beta1": 0.8}, "adam_beta1", "no effect with optimizer: sgd"),
        ({"base_model": "s3://bucket/model", "revision_of_model": "main"}, "revision_of_model", "which is no id of the hub"),
        ({"sequence_len": True}, "sequence_len", "must be a number, got true"),
        ({"val_set_size": True}, "val_set_size", "must be a number, got true"),
        ({"ray": {"num_workers": True}}, "ray.num_workers", "must be a whole number or a mapping, got True"),
        ({"adapter": "lora", "lora_target_linear": False}, "lora_target_linear", "false leaves nothing to adapt"),
        ({"adapter": "lora", "lora_target_modules": "*bad("}, "lora_target_modules", "'*bad(' is no regular expression: "),
        ({"adapter": "lora", "lora_rank_pattern": {"q_proj": 4, "[": 2}}, "lora_rank_pattern", "'[' is no regular expression"),
        ({"dpo_label_smoothing": 0.1, "dpo_loss_type": ["hinge"]}, "dpo_label_smoothing", "hinge"),
        ({"dpo_loss_weights": [1.0]}, "dpo_loss_weights", "no effect without dpo_loss_type"),
        ({"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}, "cosine_min_lr_ratio", "no effect with lr_scheduler: linear"),
        ({"cosine_constant_lr_ratio": 0.5}, "cosine_constant_lr_ratio", "no effect without cosine_min_lr_ratio"),
        ({"eval_steps": 5}, "eval_steps", "no effect without evaluation data"),
        ({"early_stopping_patience": 2}, "early_stopping_patience", "no effect without evaluation data"),
        ({"wandb_name": "n"}, "wandb_name", "no effect without use_wandb: true"),
        ({"hub_strategy": "end"}, "hub_strategy", "no effect without hub_model_id"),
        ({"metric_for_best_model": "eval_loss"}, "metric_for_best_model", "no effect without load_best_model_at_end"),
        ({"save_strategy": "no", "save_steps": 5}, "save_steps", "no effect with save_strategy: no"),
        (
            {"datasets": [{"path": "a", "roles": {"user": ["human"]}}]},
            "datasets.0.roles",
            "it belongs to chat_template.default",
        ),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_ratio", "contradicts warmup_steps"),
        ({"test_datasets": [{"path": "b"}], "val_set_size": 1}, "val_set_size", "contradicts test_datasets"),
        ({"ray": {"num_workers": 2}, "ray_num_workers": 4}, "ray_num_workers", "contradicts ray.num_workers"),
        ({"load_in_4bit": True}, "load_in_4bit", "quantized weights can't be trained in full"),
    ],
)
def test_a_key_that_would_do_nothing(keys: dict[str, Any], path: str, reason: str) -> None:
    assert reason in problems(**keys)[path]


def test_all_problems_come_at_once() -> None:
    """Unknown keys, wrong values, a plugin that isn't there, and what doesn't go together of the rest."""
    plugin = {"plugins": ["no_such_module"]}
    found = problems(rl_bta=1, rl_beta=0, lora_r=8, datasets=[{"path": "a", "typ": "b"}], **plugin)
    assert set(found) == {"rl_bta", "rl_beta", "lora_r", "datasets.0.typ", "plugins.0"}


def test_what_only_seems_wrong_beside_a_wrong_value_is_not_said() -> None:
    assert set(problems(adapter="lorra", lora_r=8)) == {"adapter"}


def test_the_message_of_a_config_lists_each_problem_on_a_line() -> None:
    with pytest.raises(ConfigError, match="recipe.yaml: 2 problems\n  lora_r: has no effect .*\n  warmup_ratio: contradicts"):
        parse_config({**GOOD, "lora_r": 8, "warmup_steps": 1, "warmup_ratio": 0.5}, origin="recipe.yaml")


def test_a_strategy_that_is_not_there_yet() -> None:
    assert problems(rl="gdpo") == {"rl": "gdpo is not available in this version; available: dpo, ipo, simpo, orpo, kto, grpo"}


def test_an_empty_key_is_not_set() -> None:
    empty = dict.fromkeys(["dataset_prepared_path", "fp16", "bf16", "load_in_8bit", "val_set_size", "seed", "ray", "debug"])
    dataset = {"path": "pairs.jsonl", "type": None, "trust_remote_code": False, "shards": None}
    assert parse_config({**GOOD, **empty, "datasets": [dataset]}) == parse_config(GOOD)


def test_a_bare_no_is_one() -> None:
    assert parse_config({**GOOD, "save_strategy": False}).save_strategy == "no"


def test_axolotls_switches_that_are_off_are_fine() -> None:
    off = {"strict": False, "group_by_length": False, "flash_attention": None, "train_on_inputs": False, "wandb_project": None}
    assert parse_config({**GOOD, **off}) == parse_config(GOOD)
