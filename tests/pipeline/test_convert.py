"""Recipes of other tools: those of Axolotl's run as they are, the others are translated, and every change has its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import convert
from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.config.peers import equivalent
from pipeline.errors import ConfigError, UserError

AXOLOTL = {"base_model": "model", "rl": "dpo", "datasets": [{"path": "pairs.jsonl"}]}


def notes(**keys: Any) -> dict[str, str]:
    """Key -> what is said of it, of a recipe that runs."""
    return dict(note.split(": ", 1) for note in parse_config({**AXOLOTL, **keys}).notes)


@pytest.mark.parametrize(
    ("keys", "key", "note"),
    [
        ({"flash_attention": True}, "flash_attention", "true is left out: kernels of its own compute the same numbers"),
        ({"sdp_attention": True}, "sdp_attention", "true is read as attn_implementation: sdpa"),
        ({"pad_to_sequence_len": True}, "pad_to_sequence_len", "true is left out: batches are packed"),
        ({"group_by_length": True}, "group_by_length", "true is left out: batches are packed"),
        ({"train_on_inputs": True}, "train_on_inputs", "true is left out: each answer's tokens are trained on"),
        ({"model_type": "LlamaForCausalLM"}, "model_type", "LlamaForCausalLM is left out: the right class is found"),
        ({"dpo_beta": 0.3}, "dpo_beta", "0.3 is read as rl_beta: 0.3"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs", "true is read as reference: cached"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"]}, "plugins", "is left out: it brings kernels"),
        ({"liger_rms_norm": True}, "liger_rms_norm", "true is left out"),
        ({"strict": True}, "strict", "true is left out: it only measures or checks"),
    ],
)
def test_a_key_of_axolotls_with_an_equivalent(keys: dict[str, Any], key: str, note: str) -> None:
    assert note in notes(**keys)[key]


@pytest.mark.parametrize(
    "keys",
    [
        {"evals_per_epoch": 0},
        {"max_steps": -1},
        {"fsdp": [], "fsdp_config": {}},
        {"dp_shard_size": 1, "tensor_parallel_size": 1, "context_parallel_size": 1},
        {"flash_attention": False, "xformers_attention": None, "debug": "", "relora": False},
        {"early_stopping_patience": 0},
        {"neftune_noise_alpha": 0},
    ],
)
def test_what_only_says_off_counts_as_not_set(keys: dict[str, Any]) -> None:
    cfg = parse_config({**AXOLOTL, **keys})
    assert not cfg.notes
    assert cfg == parse_config(AXOLOTL)


def test_fsdp_1_is_read_as_fsdp_2() -> None:
    section = {
        "fsdp_limit_all_gathers": True,
        "fsdp_sync_module_states": True,
        "fsdp_offload_params": True,
        "fsdp_use_orig_params": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_sharding_strategy": "FULL_SHARD",
    }
    workers = {"num_workers": 2}
    cfg = parse_config({**AXOLOTL, "fsdp": ["full_shard", "auto_wrap"], "fsdp_config": section, "ray": workers})
    assert cfg.fsdp_config is not None
    assert cfg.fsdp_config.model_dump(exclude_none=True) == {
        "fsdp_version": 2,
        "offload_params": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": True,
    }
    assert len(cfg.notes) == 1 + len(section)


@pytest.mark.parametrize(
    ("file", "stage"),
    [("deepspeed_configs/zero2.json", "zero2"), ("deepspeed_configs/zero3_bf16_cpuoffload_all.json", "zero3_offload")],
)
def test_axolotls_own_files_of_deepspeed(file: str, stage: str) -> None:
    cfg = parse_config({**AXOLOTL, "deepspeed": file, "ray": {"num_workers": 2}})
    assert cfg.deepspeed == stage


def test_a_key_that_changes_the_result_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**AXOLOTL, "neftune_noise_alpha": 5, "unfrozen_parameters": ["lm_head"], "flash_attention": True})
    assert dict(caught.value.problems).keys() == {"neftune_noise_alpha", "unfrozen_parameters"}


@pytest.mark.parametrize("key", ["beta", "dpo_beta"])
def test_two_names_of_one_key(key: str) -> None:
    cfg = parse_config({**AXOLOTL, key: 0.3, "rl_beta": 0.2})
    assert cfg.rl_beta == 0.2
    assert cfg.notes == (f"{key}: 0.3 is read as rl_beta: 0.2: that wins",)


TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
torch_dtype: bfloat16
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5.0e-7
per_device_train_batch_size: 4
num_train_epochs: 1
beta: 0.2
loss_type: hinge
max_length: 512
max_prompt_length: 256
use_peft: true
lora_r: 16
report_to: [wandb]
output_dir: my-run
"""
HANDBOOK = """
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
hub_model_id: zephyr-7b-dpo-full
learning_rate: 5.0e-7
lr_scheduler_type: cosine
max_length: 1024
num_train_epochs: 1
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
per_device_train_batch_size: 8
push_to_hub: false
warmup_ratio: 0.1
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
pref_beta: 0.1
pref_loss: simpo
simpo_gamma: 0.5
dataset: dpo_en_demo
template: qwen
cutoff_len: 2048
max_samples: 1000
output_dir: saves/dpo
report_to: none
per_device_train_batch_size: 1
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
deepspeed: examples/deepspeed/ds_z3_config.json
"""


@pytest.mark.parametrize(
    ("text", "tool", "expected", "left_out"),
    [
        (
            TRL,
            "TRL",
            {
                "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
                "rl": "dpo",
                "datasets": [{"path": "trl-lib/ultrafeedback_binarized", "split": "train"}],
                "dpo_loss_type": ["hinge"],
                "adapter": "lora",
                "bf16": "full",
                "use_wandb": True,
                "micro_batch_size": 4,
                "num_epochs": 1,
                "rl_beta": 0.2,
                "sequence_len": 512,
                "learning_rate": 5e-7,
                "lora_r": 16,
                "output_dir": "my-run",
                "lr_scheduler": "linear",
                "warmup_steps": 0,
                "gradient_checkpointing": True,
            },
            {"max_prompt_length"},
        ),
        (
            HANDBOOK,
            "TRL",
            {
                "base_model": "alignment-handbook/zephyr-7b-sft-full",
                "rl": "dpo",
                "datasets": [{"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}],
                "test_datasets": [{"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"}],
                "dataset_num_proc": 12,
                "rl_beta": 0.01,
                "lr_scheduler": "cosine",
                "sequence_len": 1024,
                "num_epochs": 1,
                "optimizer": "adamw_torch",
                "micro_batch_size": 8,
                "bf16": True,
                "eval_strategy": "steps",
                "eval_steps": 100,
                "gradient_accumulation_steps": 2,
                "learning_rate": 5e-7,
                "output_dir": "data/zephyr-7b-dpo-full",
                "warmup_ratio": 0.1,
                "gradient_checkpointing": True,
            },
            {"do_eval", "hub_model_id"},
        ),
        (
            LLAMA_FACTORY,
            "LLaMA-Factory",
            {
                "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
                "rl": "simpo",
                "datasets": [
                    {
                        "path": "data/dpo_en_demo.json",
                        "split": "train[:1000]",
                        "type": "chat_template.default",
                        "field_messages": "conversations",
                        "message_property_mappings": {"role": "from", "content": "value"},
                    }
                ],
                "adapter": "lora",
                "lora_alpha": 16,
                "lora_target_modules": ["q_proj", "v_proj"],
                "sequence_len": 2048,
                "excess_length_strategy": "truncate",
                "deepspeed": "zero3",
                "lora_r": 8,
                "rl_beta": 0.1,
                "micro_batch_size": 1,
                "num_epochs": 3.0,
                "lr_scheduler": "cosine",
                "simpo_gamma": 0.5,
                "output_dir": "saves/dpo",
                "learning_rate": 5e-6,
                "warmup_ratio": 0.1,
                "gradient_checkpointing": True,
            },
            {"do_train", "template", "report_to"},
        ),
    ],
    ids=["trl", "handbook", "llama-factory"],
)
def test_a_recipe_of_another_tool(tmp_path: Path, text: str, tool: str, expected: dict[str, Any], left_out: set[str]) -> None:
    (tmp_path / "dpo.yaml").write_text(text)
    converted = convert(tmp_path / "dpo.yaml")
    assert (converted.tool, converted.values) == (tool, expected)
    assert {change.key for change in converted.changes if not change.becomes} == left_out
    assert yaml.safe_load(converted.text) == expected
    assert all(path in ("deepspeed",) for path, _ in converted.problems)  # on one worker


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(TRL + "num_generations: 4\n")
    shown = CliRunner().invoke(app, ["convert", str(tmp_path / "dpo.yaml"), "--rl", "ipo"])
    assert shown.exit_code == 0, shown.output
    assert "rl: ipo  # trl ipo: the command says it" in shown.stdout
    assert "rl_beta: 0.2  # beta: its name here" in shown.stdout
    assert "lr_scheduler: linear  # TRL's default" in shown.stdout
    assert "# to be settled: num_generations: unknown key" in shown.stdout
    assert "# left out: max_prompt_length: '256' (`sequence_len` covers prompt and answer)" in shown.stdout


def test_what_trains_on_something_else(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(LLAMA_FACTORY.replace("stage: dpo", "stage: sft"))
    with pytest.raises(UserError, match="stage: sft is not training on preferences; dpo and kto are"):
        convert(tmp_path / "sft.yaml")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("per_device_train_batch_size", "micro_batch_size"),
        ("model_name_or_path", "base_model"),
        ("max_length", "sequence_len"),
        ("cutoff_len", "sequence_len"),
        ("num_train_epochs", "num_epochs"),
        ("pref_beta", "rl_beta"),
    ],
)
def test_a_key_of_another_tool_in_a_recipe_of_ours(name: str, ours: str) -> None:
    found = equivalent(name)
    assert found is not None and found[1] == ours
    with pytest.raises(ConfigError, match=f"{name}: unknown key; it is {found[0]}'s: write `{ours}`"):
        parse_config({**AXOLOTL, name: 1})
