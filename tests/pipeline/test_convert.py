"""Recipes of other tools: those of Axolotl's run as they are, the others are translated, and every change has its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline import Converted, convert
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
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs.use_reentrant",
            "is read as gradient_checkpointing_kwargs.use_reentrant: false: DDP fails with the other",
        ),
        (
            {"adapter": "lora", "lora_target_modules": "q_proj,v_proj"},
            "lora_target_modules",
            "is read as lora_target_modules: ['q_proj', 'v_proj']: names are a list here",
        ),
        ({"gradient_checkpointing": "unsloth"}, "gradient_checkpointing", "is read as gradient_checkpointing: true"),
        (
            {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["q_proj"]},
            "lora_target_modules",
            "is left out: `lora_target_linear` has all",
        ),
        ({"evals_per_epoch": 4, "val_set_size": 0.0}, "evals_per_epoch", "is left out: `val_set_size` is off or empty"),
        ({"rl": True}, "rl", "true is read as rl: dpo"),
        ({"torch_compile": "auto"}, "torch_compile", "auto is left out: nothing is compiled"),
        ({"hub_model_id": "me/it", "push_to_hub": True}, "push_to_hub", "true is left out: `hub_model_id` says it"),
        ({"adapter": None, "lora_r": 16}, "lora_r", "16 is left out: `adapter` is off or empty"),
        ({"wandb_project": "", "wandb_name": "a"}, "wandb_name", "a is left out: `wandb_project` is off or empty"),
        ({"hub_model_id": None, "hub_strategy": "every_save"}, "hub_strategy", "is left out: `hub_model_id` is off or empty"),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs",
            "is left out: `gradient_checkpointing` is off or empty",
        ),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, "deepspeed", "zero2 is left out: there is one worker"),
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_offload_params": True}}, "fsdp_config", "there is one worker"),
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
        {"sdp_attention": False, "eager_attention": False, "adapter": "", "deepspeed": False},
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
    assert parse_config({**AXOLOTL, key: 0.2, "rl_beta": 0.2}).rl_beta == 0.2
    with pytest.raises(ConfigError, match=f"{key}: contradicts rl_beta, which is its name here; keep one of them"):
        parse_config({**AXOLOTL, key: 0.3, "rl_beta": 0.2})


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
                "lora_alpha": 32,
                "lora_dropout": 0.05,
                "output_dir": "my-run",
                "lr_scheduler": "linear",
                "excess_length_strategy": "truncate",
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
                "excess_length_strategy": "truncate",
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
                "lora_dropout": 0.0,
                "cpo_alpha": 0.0,
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
    assert {path for path, _ in converted.problems} <= {"datasets", "deepspeed"}  # columns that are guessed, and one worker


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "dpo.yaml").write_text(TRL + "num_generations: 4\n")
    shown = CliRunner().invoke(app, ["convert", str(tmp_path / "dpo.yaml"), "--rl", "ipo"])
    assert shown.exit_code == 0, shown.output
    assert "rl: ipo  # --rl says it" in shown.stdout
    assert "rl_beta: 0.2  # beta: its name here" in shown.stdout
    assert "lr_scheduler: linear  # TRL's default" in shown.stdout
    assert "# to be settled: num_generations: unknown key" in shown.stdout
    assert "2 to be settled" in shown.stderr
    assert "# left out: max_prompt_length: '256' (`sequence_len` covers prompt and answer)" in shown.stdout


HEAD = {"model_name_or_path": "m", "dataset_name": "a/b", "output_dir": "o"}
MIXED = {"model_name_or_path": "m", "output_dir": "o"}
LLAMA = {"model_name_or_path": "m", "stage": "dpo", "finetuning_type": "lora", "dataset": "d", "output_dir": "o"}


def converted(folder: Path, values: Any, rl: str | None = None) -> Converted:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    made = convert(folder / "recipe.yaml", rl)
    assert yaml.safe_load(made.text) == made.values
    return made


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({**HEAD, "max_steps": -1}, {"num_epochs": 3}),
        ({**HEAD, "max_steps": 5}, {"max_steps": 5}),
        ({**HEAD, "use_peft": True}, {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}),
        ({**HEAD, "loss_type": "simpo"}, {"rl": "simpo", "rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}),
        (
            {**HEAD, "beta": 10.0, "gamma_beta_ratio": 0.3},  # as SimPO's own code has it
            {"rl": "simpo", "rl_beta": 10.0, "simpo_gamma": 3.0, "cpo_alpha": 0.0},
        ),
        (
            {**HEAD, "gamma_beta_ratio": 0.5, "sft_weight": 0.2},
            {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.2},
        ),
        (
            {**HEAD, "reward_funcs": ["rewards.short"], "num_generations": 8, "loss_type": "dr_grpo"},
            {"rl": "grpo", "trl": {"loss_type": "dr_grpo", "num_generations": 8, "reward_funcs": ["rewards.short"]}},
        ),
        ({**HEAD, "run_name": "a", "report_to": ["wandb"]}, {"wandb_name": "a", "use_wandb": True}),
        ({**HEAD, "run_name": "a"}, {"wandb_name": None}),
        ({**HEAD, "undesirable_weight": 2}, {"rl": "kto", "kto_undesirable_weight": 2}),
        ({**HEAD, "dtype": "bfloat16", "bf16": True}, {"bf16": "full"}),
        ({**HEAD, "chat_template": "{% for m in messages %}\n{{ m }}\t{% endfor %}"}, {"chat_template": "jinja"}),
        ({**LLAMA, "lora_rank": "8"}, {"lora_r": 8, "lora_alpha": 16}),
        ({**LLAMA, "quantization_bit": 4}, {"adapter": "qlora", "load_in_4bit": True}),
        ({**LLAMA, "disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({**LLAMA, "pref_loss": "simpo"}, {"rl": "simpo", "rl_beta": 0.1}),
        ({**LLAMA, "additional_target": "embed_tokens,lm_head"}, {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        (
            {"model_name_or_path": "m", "dataset_mixture": {"datasets": [{"id": "a/b", "config": "c", "split": "s"}]}},
            {"datasets": [{"path": "a/b", "name": "c", "split": "s"}]},
        ),
        (
            {
                **MIXED,
                "eval_strategy": "steps",
                "dataset_mixture": {
                    "datasets": [
                        {"id": "a/b", "split": "s", "columns": ["chosen"]},
                        {"id": "a/b", "split": "t", "weight": 1.0},
                    ],
                    "test_split_size": 100,
                },
            },
            {
                "datasets": [{"path": "a/b", "split": "s"}, {"path": "a/b", "split": "t"}],
                "test_datasets": None,
                "val_set_size": 100,
            },
        ),
        ({**HEAD, "eval_strategy": "steps"}, {"test_datasets": [{"path": "a/b", "split": "test"}]}),
        ({**HEAD, "eval_strategy": "no"}, {"test_datasets": None}),
        ({**MIXED, "dataset_mixture": {"datasets": [{"id": "a/b"}], "test_split_size": 0.1, "seed": 3}}, {"val_set_size": 0.1}),
        ({**HEAD, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4"}}),
        ({**HEAD, "reference_free": False, "callbacks": []}, {"reference_free": None, "callbacks": None}),
        ({**LLAMA, "quantization_bit": 4, "quantization_method": "bnb"}, {"load_in_4bit": True, "quantization_method": None}),
    ],
)
def test_what_the_tool_would_train(tmp_path: Path, values: Any, expected: dict[str, Any]) -> None:
    made = converted(tmp_path, values)
    assert {name: made.values.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        (
            {"model_name_or_path": "m", "dataset_mixer": {"a/b": 0.5}},
            "datasets",
            "0.5 of a/b is asked for; write a number of rows",
        ),
        ({**HEAD, "loss_type": "apo_zero_unpaired"}, "rl", "kto has no loss 'apo_zero_unpaired' here"),
        ({**HEAD, "gamma_beta_ratio": 0.5, "loss_type": "hinge"}, "rl", "simpo has no loss 'hinge' here"),
        ({**HEAD, "truncation_mode": "keep_end"}, "excess_length_strategy", "keep_end cuts the beginning of prompts"),
        ({**HEAD, "max_length": None}, "sequence_len", "the recipe sets no limit"),
        ({**HEAD, "torch_dtype": "auto"}, "torch_dtype", "auto is the checkpoint's type"),
        ({**HEAD, "push_to_hub": True}, "hub_model_id", "name the repository"),
        ({**HEAD, "evaluation_strategy": "no", "eval_strategy": "steps"}, "eval_strategy", "keep one"),
        (LLAMA, "datasets", "compare paths and columns with dataset_info.json"),
    ],
)
def test_what_a_person_has_to_settle(tmp_path: Path, values: Any, path: str, message: str) -> None:
    assert message in "; ".join(text for name, text in converted(tmp_path, values).problems if name == path)


def test_a_part_of_a_data_set_does_not_become_all_of_it(tmp_path: Path) -> None:
    """A share isn't known here: what was converted is refused until a number of rows stands there."""
    made = converted(tmp_path, {**MIXED, "dataset_mixer": {"a/b": 0.5, "c/d": 1.0}})
    assert [entry["split"] for entry in made.values["datasets"]] == ["train[:50%]", "train"]
    with pytest.raises(ConfigError, match=r"train\[:50%\]"):
        parse_config(made.values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**HEAD, "dataset_name": ["a"]}, "dataset_name: must be a name"),
        ({"model_name_or_path": "m", "dataset_mixer": ["a", "b"]}, "dataset_mixer: must be data sets and their parts"),
        ({"model_name_or_path": "m", "dataset_mixer": {"a/b": None}}, "dataset_mixer.a/b: must be a number, got None"),
        ({**HEAD, "dataset_splits": "train_prefs"}, "dataset_splits: must be a list of names"),
        ({**HEAD, 1: 2}, "a key must be text, got 1"),
        ({**HEAD, "precompute_ref_log_probs": "no"}, "precompute_ref_log_probs: must be true or false"),
        ({**LLAMA, "stage": None}, "stage: not given is not training on preferences"),
        ({**LLAMA, "max_samples": "x"}, "max_samples: must be a number"),
        ({**LLAMA, "lora_target": 7}, "lora_target: must be names, got 7"),
        ({**LLAMA, "dataset": [None]}, "dataset: must be names"),
        ({**LLAMA, "quantization_bit": 3}, "quantization_bit: must be 4 or 8, got 3"),
    ],
)
def test_what_no_tool_would_take(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(tmp_path, values)


@pytest.mark.parametrize(("values", "rl"), [(HEAD, "ppo"), (LLAMA, "kto"), (AXOLOTL, "kto")])
def test_a_method_that_cannot_be(tmp_path: Path, values: Any, rl: str) -> None:
    with pytest.raises(UserError, match="--rl: "):
        converted(tmp_path, values, rl)


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp": 3},
        {"fsdp": ["full_shard", "hybrid"]},
        {"fsdp": ["full_shard"], "fsdp_config": "x"},
        {"fsdp_config": {"fsdp_offload_params": False, "offload_params": True}},
        {"precompute_ref_log_probs": True, "reference": "live"},
        {"precompute_ref_log_probs": "no"},
        {"sdp_attention": True, "eager_attention": True},
        {"sdp_attention": "x"},
    ],
)
def test_what_cannot_be_translated_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config({**AXOLOTL, "ray": {"num_workers": 2}, **keys})


def test_words_of_fsdp() -> None:
    cfg = parse_config({**AXOLOTL, "ray": {"num_workers": 2}, "fsdp": "shard_grad_op auto_wrap offload"})
    assert cfg.fsdp_config is not None
    assert (cfg.fsdp_config.offload_params, cfg.fsdp_config.reshard_after_forward) == (True, False)


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
        ("loss_type", "dpo_loss_type"),
        ("dataset_name", "datasets"),
        ("torch_dtype", "bf16"),
        ("use_peft", "adapter"),
        ("max_samples", "datasets.0.split"),
    ],
)
def test_a_key_of_another_tool_in_a_recipe_of_ours(name: str, ours: str) -> None:
    found = equivalent(name)
    assert found is not None and found[1] == ours
    with pytest.raises(ConfigError, match=f"{name}: unknown key; it is {found[0]}'s: write `{ours}`"):
        parse_config({**AXOLOTL, name: 1})


@pytest.mark.parametrize(
    "name", ["disable_tqdm", "use_galore", "use_badam", "num_beams", "logging_dir", "mix_strategy", "precision"]
)
def test_another_word_is_no_slip_of_the_pen(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: unknown key; `prefray schema` lists every key"):
        parse_config({**AXOLOTL, name: 1})
