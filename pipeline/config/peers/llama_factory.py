"""Translation of LLaMA-Factory's recipes, which have transformers' arguments and its own."""

from __future__ import annotations

from typing import Any

from pipeline.config.changes import Change
from pipeline.config.peers.shared import (
    TRAINING,
    Results,
    Step,
    Tool,
    Values,
    deepspeed,
    hub,
    length,
    precision,
    taken,
    trackers,
)
from pipeline.errors import UserError

__all__ = ["LLAMA_FACTORY"]

NAMES: dict[str, str] = {
    **TRAINING,
    "model_revision": "revision_of_model",
    "lora_rank": "lora_r",
    "pref_beta": "rl_beta",
    "pref_ftx": "rpo_alpha",
    "kto_chosen_weight": "kto_desirable_weight",
    "kto_rejected_weight": "kto_undesirable_weight",
    "ref_model": "reference_model",
    "val_size": "val_set_size",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "run_name": "wandb_name",
    "adapter_name_or_path": "lora_model_dir",
    "cutoff_len": "sequence_len",
}
ADVICE: dict[str, str] = {
    "stage": "rl",
    "pref_loss": "dpo_loss_type",
    "finetuning_type": "adapter",
    "quantization_bit": "load_in_4bit",
    "lora_target": "lora_target_modules",
    "additional_target": "lora_modules_to_save",
    "flash_attn": "attn_implementation",
    "max_samples": "datasets.0.split",
    "dataset": "datasets",
    "dataset_dir": "datasets.0.path",
    "eval_dataset": "test_datasets",
    "template": "chat_template",
    "tokenized_path": "dataset_prepared_path",
}
ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
SHAPES: dict[str, Values] = {
    "ranking": {
        "type": "chat_template.default",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "desirable": {"type": "chat_template.default", "field_messages": "messages", "field_label": "label"},
}
"""Format of the rows of LLaMA-Factory's own examples."""


def _method(rl: str | None) -> Step:
    def method(values: Values) -> Results:
        stage, loss = values.pop("stage", None), values.pop("pref_loss", "sigmoid")
        if stage not in ("dpo", "kto"):
            raise UserError(f"stage: {stage or 'not given'} is not training on preferences; dpo and kto are")
        # orpo and simpo are losses of the stage dpo there, methods of their own here.
        resolved = loss if stage == "dpo" and loss in ("orpo", "simpo") else stage
        if rl not in (None, resolved):
            raise UserError(f"--rl: got {rl}, and the recipe says {resolved}; leave it out")
        yield Change("stage" if resolved == stage else "pref_loss", resolved, {"rl": resolved}, "its name here")
        if resolved == "dpo" and loss != "sigmoid":
            yield Change("pref_loss", loss, {"dpo_loss_type": [loss]}, "its name here")

    return method


def _datasets(values: Values) -> Results:
    # Names refer to `dataset_info.json`; the rows are assumed to be conversations as in LLaMA-Factory's own examples.
    folder, limit = values.pop("dataset_dir", "data"), values.pop("max_samples", None)
    if limit is not None and (isinstance(limit, bool) or not str(limit).isdigit()):
        raise UserError(f"max_samples: must be a number, got {limit!r}")
    # `_method`, which takes `stage` out, comes after these steps.
    is_labelled = values.get("stage") == "kto"
    for key, ours in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
        value = values.pop(key, None)
        if value is None:
            continue
        names = _names(key, value)
        part = {} if limit is None else {"split": f"train[:{limit}]"}
        paths = [f"{folder}/{name.removesuffix('.json')}.json" for name in names]
        entries = [{"path": path, **part, **SHAPES["desirable" if is_labelled else "ranking"]} for path in paths]
        yield Change(key, value, {ours: entries}, "files of dataset_dir, with the columns of LLaMA-Factory's examples")
        yield ours, "compare paths and columns with dataset_info.json"


def _names(key: str, value: Any) -> list[str]:
    """Read names from a list, or from a comma-separated string. Raises UserError."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key}: must be names, got {value!r}")
    return names


def _finetuning(values: Values) -> Results:
    kind, bits = values.pop("finetuning_type", "lora"), _number(values, "quantization_bit")
    for name, value in taken(values, "quantization_method").items():
        if str(value) not in ("bnb", "bitsandbytes"):
            yield name, f"{value} is not available; bitsandbytes is (load_in_4bit, load_in_8bit)"
        else:
            yield Change(name, value, {}, "bitsandbytes quantizes")
    if bits not in (None, 4, 8):
        raise UserError(f"quantization_bit: must be 4 or 8, got {bits}")
    rank = _number(values, "lora_rank")
    if rank is not None or kind == "lora":
        # Put back as a number, for `_renamed` to translate.
        values["lora_rank"] = rank = rank or 8
    if bits is not None:
        yield Change("quantization_bit", bits, {f"load_in_{bits}bit": True}, "its name here")
    if kind == "lora":
        yield Change("finetuning_type", kind, {"adapter": "qlora" if bits == 4 else "lora"}, "its name here")
        if "lora_alpha" not in values:
            yield Change("lora_alpha", "not set", {"lora_alpha": 2 * (rank or 8)}, "twice the rank, LLaMA-Factory's default")
    elif kind == "full":
        yield Change("finetuning_type", kind, {}, "all weights are trained without an adapter")
        for name, value in taken(values, *(name for name in list(values) if name.startswith("lora_"))).items():
            yield Change(name, value, {}, "without an adapter it has no effect")
    else:
        # Neither lora nor full: validation rejects it by name.
        values["finetuning_type"] = kind
    target = values.pop("lora_target", None)
    if target == "all":
        yield Change("lora_target", target, {"lora_target_linear": True}, "its name here")
    elif target is not None:
        yield Change("lora_target", target, {"lora_target_modules": _names("lora_target", target)}, "a list here")
    for name, value in taken(values, "additional_target").items():
        yield Change(name, value, {"lora_modules_to_save": _names(name, value)}, "a list here")


def _number(values: Values, name: str) -> int | None:
    """Remove an integer from the recipe, which may be text; returns None without one. Raises UserError."""
    value = values.pop(name, None)
    if value is not None and (isinstance(value, bool) or not str(value).isdigit()):
        raise UserError(f"{name}: must be a whole number, got {value!r}")
    return None if value is None else int(value)


def _model(values: Values) -> Results:
    for name, value in taken(values, "template").items():
        yield Change(name, value, {}, "the tokenizer's own chat template is used; set chat_template for another")
    for name, value in taken(values, "disable_gradient_checkpointing").items():
        yield Change(name, value, {"gradient_checkpointing": not value}, "its name here")
    for name, value in taken(values, "flash_attn").items():
        ours = ATTENTION.get(str(value))
        why = "its name here" if ours else "the hardware chooses"
        yield Change(name, value, {"attn_implementation": ours} if ours else {}, why)


LLAMA_FACTORY = Tool(
    NAMES,
    ADVICE,
    defaults={
        "learning_rate": 5e-5,
        "micro_batch_size": 8,
        "num_epochs": 3,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "sequence_len": 2048,
        "excess_length_strategy": "truncate",
        "gradient_checkpointing": True,
    },
    adapter_defaults={"lora_r": 8, "lora_dropout": 0.0},
    method_defaults={"simpo": {"rl_beta": 0.1, "cpo_alpha": 0.0, "simpo_gamma": 0.5}},
    steps=(_datasets, _finetuning, _model, precision, length, trackers, deepspeed, hub),
    method=_method,
)
