"""Recipes for preferences as Axolotl's examples and its users have published them: keys and values as they stand there.

Each loads, or is told everything in one round. Those that load train a tiny model on rows of the shape that their data sets
have, without quantization and its optimizers, which need a GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from pipeline.config import parse_config
from pipeline.errors import ConfigError
from strategies import train
from strategies.dataset_rows import ID_COLUMNS, ROW_ID
from strategies.methods.registry import get_strategy
from strategies.training import TrainDatasetMeta
from tests.laws.runs import losses
from tests.pipeline.data.conftest import prepare_here

MODULES = "[gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]"
MESSAGES = """
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings: {role: role, content: content}
"""
ROLES = "    roles: {system: [system], user: [user], assistant: [assistant]}"
OPTIMIZED = """
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
gradient_checkpointing: true
logging_steps: 1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
tf32: false
lora_model_dir:
resume_from_checkpoint:
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
"""
UNUSED = """
train_on_inputs: false
group_by_length: false
fp16:
early_stopping_patience:
local_rank:
xformers_attention:
eval_table_size:
eval_max_new_tokens: 128
debug:
deepspeed:
fsdp:
fsdp_config:
"""

RECIPES = {
    "llama-3, dpo with LoRA": f"""
base_model: meta-llama/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
special_tokens: {{pad_token: <|finetune_right_pad_id|>, eos_token: <|eot_id|>}}
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
rl: dpo
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test{MESSAGES}{ROLES}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
bf16: auto
flash_attention: true
warmup_steps: 10
{OPTIMIZED}""",
    "qwen2, dpo of all weights": f"""
base_model: Qwen/Qwen2.5-0.5B
strict: false
chat_template: qwen_25
rl: dpo
datasets:
  - path: fozziethebeat/alpaca_messages_2k_dpo_test{MESSAGES}{ROLES}
dataset_prepared_path:
val_set_size: 0.0
output_dir: ./outputs/dpo-out
sequence_len: 2048
sample_packing: false
pad_to_sequence_len: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
bf16: auto
flash_attention: true
warmup_steps: 10
{OPTIMIZED}{UNUSED}""",
    "mistral, dpo with QLoRA": f"""
base_model: mistralai/Mistral-7B-Instruct-v0.2
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
chat_template: chatml
rl: dpo
datasets:
  - path: olivermolenschot/alpaca_messages_dpo_test{MESSAGES}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/dpo-qlora
sequence_len: 2048
sample_packing: false
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.2
lora_target_linear: true
lora_target_modules: {MODULES}
lora_modules_to_save: [embed_tokens, lm_head]
gradient_accumulation_steps: 4
micro_batch_size: 16
num_epochs: 6
bfloat16: auto
flash_attention: false
warmup_ratio: 0.1
special_tokens: {{bos_token: "<|im_start|>", eos_token: "<|im_end|>"}}
{OPTIMIZED}""",
    "mistral, orpo with QLoRA": f"""
base_model: mistralai/Mistral-7B-v0.1
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
rl: orpo
orpo_alpha: 0.1
remove_unused_columns: false
chat_template: chatml
datasets:
  - path: argilla/ultrafeedback-binarized-preferences-cleaned
    type: chat_template.argilla
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/mistral-qlora-orpo-out
adapter: qlora
sequence_len: 4096
sample_packing: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules: {MODULES}
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
bf16: auto
flash_attention: true
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_ratio: 0.1
special_tokens:
{OPTIMIZED}""",
    "llama-3.2, kto with QLoRA": f"""
base_model: meta-llama/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
strict: false
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
datasets:
  - path: argilla/ultrafeedback-binarized-preferences-cleaned-kto
    type: llama3.ultra
    split: train
dataset_prepared_path: last_run_prepared
val_set_size: 0.0
output_dir: ./outputs/qlora-out
remove_unused_columns: false
adapter: qlora
sequence_len: 2048
sample_packing: false
eval_sample_packing: false
pad_to_sequence_len: false
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
lora_fan_in_fan_out:
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
gradient_checkpointing_kwargs: {{use_reentrant: false}}
bf16: auto
flash_attention: true
warmup_steps: 20
special_tokens: {{pad_token: "<|end_of_text|>"}}
{OPTIMIZED}{UNUSED}""",
    "falcon-e, dpo of one-bit weights": """
base_model: axolotl-ai-co/Falcon-E-1.2-3B-Exp-prequantized
output_dir: ./output
plugins: [axolotl.integrations.kernels.KernelsPlugin]
use_kernels: false
use_scattermoe: false
use_sonicmoe: false
use_onebitllms: true
load_in_8bit: false
load_in_4bit: false
chat_template: tokenizer_default
rl: dpo
datasets: [{path: allenai/Dolci-Think-DPO-7B, split: train, type: chatml.ultra}]
dataset_prepared_path: ./axolotl_dataset_cache
sequence_len: 8192
trust_remote_code: false
gradient_accumulation_steps: 4
accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}
micro_batch_size: 1
num_epochs: 3
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 1.0e-5
adam_beta1: 0.9
adam_beta2: 0.95
bf16: true
tf32: false
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 15.0
loss_watchdog_patience: 3
warmup_steps: 128
evals_per_epoch: 0
save_steps: 500
save_strategy: steps
weight_decay: 0.01
shuffle_merged_datasets: true
experimental_skip_move_to_device: true
fsdp_version: 2
fsdp_config:
  offload_params: false
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: LlamaDecoderLayer
  state_dict_type: FULL_STATE_DICT
  reshard_after_forward: true
  activation_checkpointing: true
dp_shard_size: 1
dp_replicate_size: 1
tensor_parallel_size: 1
context_parallel_size: 1
special_tokens: {eos_token: <|end_of_text|>}
eot_tokens: [<|im_end|>]
""",
    "qwen2.5, dpo with LoRA": f"""
base_model: Qwen/Qwen2.5-7B-Instruct
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
is_qwen_derived_model: false
load_in_4bit: false
strict: false
rl: dpo
rl_beta: 0.1
chat_template: qwen_25
datasets: [{{path: a/b, split: train, type: chatml.ultra}}]
dataset_prepared_path: ./prepared
val_set_size: 0.0
output_dir: ./outputs/manual
sequence_len: 2048
sample_packing: false
pad_to_sequence_len: false
adapter: lora
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: {MODULES}
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 5e-7
warmup_ratio: 0.1
weight_decay: 0.0
bf16: auto
flash_attention: false
gradient_checkpointing: true
logging_steps: 1
saves_per_epoch: 1
save_safetensors: true
""",
    "iterated dpo with an answer's likelihood": """
group_by_length: true
base_model: a/b
ref_model: a/b
trust_remote_code: true
rl: dpo
rl_beta: 0.07
rpo_alpha: 1.0
sequence_len: 8192
flash_attn_2: true
gradient_checkpointing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 5e-6
optimizer: adamw_torch
lr_scheduler: cosine
warmup_steps: 5
weight_decay: 0.0
max_grad_norm: 1.0
deepspeed: deepspeed_configs/zero3_bf16_cpuoffload_all.json
bf16: true
datasets: [{path: pairs.jsonl, type: chatml.prompt_pairs}]
val_set_size: 0.05
output_dir: out
wandb_project: it
logging_steps: 10
evals_per_epoch: 1
save_strategy: "no"
""",
    "llama-3.1, dpo in 4 bits": """
base_model: meta-llama/Llama-3.1-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_4bit: true
strict: false
rl: dpo
datasets: [{path: data/preferences.jsonl, type: chatml.intel}]
val_set_size: 0.05
output_dir: ./outputs/dpo
adapter: lora
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
sequence_len: 2048
sample_packing: false
gradient_accumulation_steps: 4
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 5e-7
warmup_ratio: 0.1
bf16: auto
gradient_checkpointing: true
""",
    "kto with columns of one's own": """
base_model: Qwen/Qwen2.5-0.5B
rl: kto
rl_beta: 0.1
kto_desirable_weight: 1.0
kto_undesirable_weight: 1.0
remove_unused_columns: false
sample_packing: false
datasets:
  - path: a/b
    split: train
    type:
      field_prompt: question
      field_completion: answer
      field_label: is_good
      prompt_format: "{prompt}"
      completion_format: "{completion}"
sequence_len: 2048
output_dir: ./outputs/kto-out
""",
    "the same, with the word for it": """
base_model: Qwen/Qwen2.5-0.5B
rl: kto
datasets:
  - path: a/b
    type: user_defined.default
    field_prompt: question
    field_completion: answer
    field_label: is_good
    prompt_format: "{prompt}"
    completion_format: "{completion}"
sequence_len: 2048
output_dir: ./outputs/kto-out
""",
    "dpo with QLoRA, as short as it gets": """
base_model: meta-llama/Meta-Llama-3-8B-Instruct
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_4bit: true
adapter: qlora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_dropout: 0.05
datasets: [{path: my_dpo_dataset.jsonl, type: chatml.intel}]
rl: dpo
beta: 0.1
learning_rate: 5e-5
num_epochs: 3
micro_batch_size: 2
gradient_accumulation_steps: 4
warmup_steps: 100
output_dir: ./output
""",
}
REFUSED = {
    "falcon-e, dpo of one-bit weights": {"use_onebitllms"},
    "iterated dpo with an answer's likelihood": {"flash_attn_2", "ref_model"},
}
"""Recipe -> every key that is told in the first round: what isn't supported, or isn't Axolotl's."""
ASKED, BETTER, WORSE = "Why?", "Because.", "No."
TURNS = [{"role": "user", "content": ASKED}]
CHOSEN, REJECTED = ([*TURNS, {"role": "assistant", "content": text}] for text in (BETTER, WORSE))
ROWS: dict[Any, dict[str, Any]] = {
    "chat_template.default": {"conversation": TURNS, "chosen": CHOSEN[-1], "rejected": REJECTED[-1]},
    "chat_template.argilla": {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
    "chatml.ultra": {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
    "chatml.intel": {"system": "", "question": ASKED, "chosen": BETTER, "rejected": WORSE},
    "llama3.ultra": {"prompt": ASKED, "completion": BETTER, "label": True},
    "user_defined": {"question": ASKED, "answer": BETTER, "is_good": True},
}
"""Type -> a row of it, as the cards of the data sets show them."""


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_or_is_told_everything_at_once(name: str, tiny_base: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPES[name])
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            parse_config(recipe)
        assert {key for key, _ in caught.value.problems} == REFUSED[name]
        return
    parse_config(recipe)
    keys = small(recipe, tiny_base, tmp_path)
    prepared = prepare_here(parse_config(keys))
    (prompt,), (answer,) = (set(prepared.read()[name].to_pylist()) for name in ("prompt", ANSWER.get(recipe["rl"], "chosen")))
    assert ASKED in prompt and answer.strip().startswith(BETTER)
    rows = Dataset(prepared.read("train", [*ID_COLUMNS[get_strategy(recipe["rl"]).batch_kind], ROW_ID]))
    _, _, trainer = train(cfg=parse_config(keys), dataset_meta=TrainDatasetMeta(rows))
    assert trainer.state.global_step == 2 and all(map(math.isfinite, losses(trainer)))


ANSWER = {"kto": "completion"}
"""Column of the better answer."""
QUANTIZED = ("load_in_4bit", "load_in_8bit")


def small(recipe: dict[str, Any], base: str, folder: Path) -> dict[str, Any]:
    """What makes two steps on a CPU of a recipe, with rows as its data set's card shows them; everything else stays."""
    type_ = recipe["datasets"][0]["type"]
    row = ROWS["user_defined" if isinstance(type_, dict) or "user_defined" in type_ else type_]
    rows = [row, {**row, **({"label": False} if "label" in row else {"is_good": False} if "is_good" in row else {})}] * 4
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    there = {"path": str(folder / "rows.jsonl"), "split": "train"}
    return {
        **{name: value for name, value in recipe.items() if name not in QUANTIZED and not name.startswith("eval")},
        "base_model": base,
        "adapter": "lora" if recipe.get("adapter") else None,
        "optimizer": recipe.get("optimizer", "adamw_torch").replace("bnb_8bit", "torch").replace("8bit", "torch"),
        "special_tokens": {"bos_token": "<s>", **(recipe.get("special_tokens") or {})},  # as the models' own have it
        "datasets": [{**entry, **there} for entry in recipe["datasets"]],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "run"),
        "val_set_size": 0,
        "micro_batch_size": recipe.get("micro_batch_size", 2),
        "max_steps": 2,
        "sequence_len": 256,
        "tf32": None,
    }
