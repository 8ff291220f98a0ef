"""TRL's recipes, and the alignment-handbook's, which hold arguments of the same classes.

Those are `ModelConfig`, `ScriptArguments`, transformers' `TrainingArguments` and the trainer's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.changes import Change
from pipeline.config.peers.shared import (
    TRAINING,
    Found,
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

__all__ = ["TRL"]

NAMES: dict[str, str] = {
    **TRAINING,
    "model_revision": "revision_of_model",
    "hub_model_revision": "hub_revision",
    "max_length": "sequence_len",
    "beta": "rl_beta",
    "label_smoothing": "dpo_label_smoothing",
    "loss_weights": "dpo_loss_weights",
    "ld_alpha": "dpo_ld_alpha",
    "discopop_tau": "dpo_discopop_tau",
    "use_weighting": "dpo_use_weighting",
    "f_divergence_type": "dpo_f_divergence_type",
    "f_alpha_divergence_coef": "dpo_f_alpha_divergence_coef",
    "desirable_weight": "kto_desirable_weight",
    "undesirable_weight": "kto_undesirable_weight",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "run_name": "wandb_name",
    "ref_model_name_or_path": "reference_model",
}
ADVICE: dict[str, str] = {
    "loss_type": "dpo_loss_type",
    "dataset_name": "datasets",
    "dataset_mixer": "datasets",
    "dataset_mixture": "datasets",
    "dataset_config": "datasets.0.name",
    "dataset_configs": "datasets.0.name",
    "dataset_train_split": "datasets.0.split",
    "dataset_test_split": "test_datasets",
    "dataset_splits": "datasets.0.split",
    "torch_dtype": "bf16",
    "dtype": "bf16",
    "use_peft": "adapter",
    "report_to": "use_wandb",
    "use_flash_attention_2": "attn_implementation",
    "gamma_beta_ratio": "simpo_gamma",
    "chat_template_path": "chat_template_jinja",
}


def _method(rl: str | None) -> Step:
    def method(values: Values) -> Found:
        loss = values.pop("loss_type", None)
        losses = loss if isinstance(loss, list) else [loss]
        if losses == ["simpo"] or rl in ("orpo", "simpo", "kto", "grpo"):
            found = rl or "simpo"
            if loss is not None:
                yield Change("loss_type", loss, {"rl": found}, "a method of its own")
        else:
            found = rl or ("kto" if values.keys() & {"desirable_weight", "undesirable_weight"} else "dpo")
            if loss is not None:
                yield Change("loss_type", loss, {"dpo_loss_type": losses}, "its name here")
        why = (
            "--rl says it" if rl else "by its arguments" if found != "dpo" else "the file doesn't say it; give --rl for another"
        )
        yield Change("rl", "not set", {"rl": found}, "--rl says it" if rl else why)

    return method


def _template(values: Values) -> Found:
    """The handbook gives a template's text."""
    given = values.get("chat_template")
    if isinstance(given, str) and "{" in given:
        values.pop("chat_template")
        yield Change("chat_template", given, {"chat_template": "jinja", "chat_template_jinja": given}, "a template's text")


def _simpo(values: Values) -> Found:
    """SimPO's own code gives the margin as a multiple of beta."""
    for name, ratio in taken(values, "gamma_beta_ratio").items():
        beta = values.get("beta", 0.1)
        yield Change(name, ratio, {"simpo_gamma": ratio * beta}, f"times beta {beta}")


def _flash(values: Values) -> Found:
    for name, value in taken(values, "use_flash_attention_2").items():
        becomes = {"attn_implementation": "flash_attention_2"} if value else {}
        yield Change(name, value, becomes, "its name here" if value else "it is off")


def _quantization(values: Values) -> Found:
    for name, value in taken(values, "bnb_4bit_quant_type").items():
        becomes = {"bnb_config_kwargs": {name: value}} if values.get("load_in_4bit") else {}
        yield Change(name, value, becomes, "an argument of bitsandbytes" if becomes else "nothing is quantized")


def _adapter(values: Values) -> Found:
    kind = "qlora" if values.get("load_in_4bit") else "lora"
    given = taken(values, "use_peft")
    if given.get("use_peft"):
        yield Change("use_peft", True, {"adapter": kind}, "its name here")
    elif given:
        yield Change("use_peft", False, {}, "all weights are trained without an adapter")
        for name, value in taken(values, *(name for name in list(values) if name.startswith("lora_"))).items():
            yield Change(name, value, {}, "without an adapter it has no effect")


def _reference(values: Values) -> Found:
    for name, value in taken(values, "precompute_ref_log_probs").items():
        if not isinstance(value, bool):
            raise UserError(f"{name}: must be true or false, got {value!r}")
        yield Change(name, value, {"reference": "cached"} if value else {}, "its name here" if value else "it is off")


def _datasets(values: Values) -> Found:
    """`dataset_name` with its splits, or the handbook's mixer or mixture."""
    given = taken(values, "dataset_name", "dataset_mixer", "dataset_mixture")
    splits = values.pop("dataset_splits", [])
    train, test, config = (values.pop(name, None) for name in ("dataset_train_split", "dataset_test_split", "dataset_config"))
    if not isinstance(splits, list) or not all(isinstance(one, str) for one in splits):
        raise UserError(f"dataset_splits: must be a list of names, got {splits!r}")
    train = train or next((one for one in splits if "train" in one), "train")
    test = test or next((one for one in splits if "test" in one), None)
    if test is None and values.get("eval_strategy") not in (None, "no", False):
        test = "test"  # TRL's default
    for key, value in given.items():
        entries, parts = _entries(key, value, config, train)
        becomes: Values = {"datasets": entries}
        if test:
            becomes["test_datasets"] = [{**entry, "split": test} for entry in entries]
        yield Change(key, value, becomes, "a list here")
        for entry in entries:
            if (part := parts.get(entry["path"])) is not None:  # which is refused until it is a number of rows
                entry["split"] = f"{entry['split']}[:{part:.0%}]"
                yield "datasets", f"{part:g} of {entry['path']} is asked for; write a number of rows: split: {train}[:1000]"
        if key == "dataset_mixture" and isinstance(value, Mapping):
            if value.get("test_split_size"):
                size = value["test_split_size"]
                yield Change(f"{key}.test_split_size", size, {"val_set_size": size}, "its name here")
            if value.get("seed") is not None:
                yield Change(f"{key}.seed", value["seed"], {}, "`seed` shuffles and splits the rows")


def _entries(key: str, value: Any, config: Any, split: str) -> tuple[list[Values], dict[str, float]]:
    """The data sets of an argument, and those of which only a part is asked for."""
    named = {"name": config} if config else {}
    if key == "dataset_name" and isinstance(value, str):
        return [{"path": value, **named, "split": split}], {}
    if key == "dataset_mixer" and isinstance(value, Mapping):
        parts = {path: _part(key, part) for path, part in value.items()}
        return [{"path": path, **named, "split": split} for path in value], {k: part for k, part in parts.items() if part != 1}
    listed = value.get("datasets") if key == "dataset_mixture" and isinstance(value, Mapping) else None
    if (
        isinstance(listed, list)
        and listed
        and all(isinstance(one, Mapping) and isinstance(one.get("id"), str) for one in listed)
    ):
        entries = [
            {"path": one["id"], **({"name": one["config"]} if one.get("config") else {}), "split": one.get("split", split)}
            for one in listed
        ]
        parts = {one["id"]: _part(key, one.get("weight") or 1) for one in listed}
        return entries, {path: part for path, part in parts.items() if part != 1}
    takes = {"dataset_name": "a name", "dataset_mixer": "data sets and their parts"}.get(key, "`datasets:` with an id each")
    raise UserError(f"{key}: must be {takes}, got {str(value)[:80]!r}")


def _part(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}: a part must be a number, got {value!r}")
    return float(value)


TRL = Tool(
    NAMES,
    ADVICE,
    defaults={
        "learning_rate": 1e-6,
        "micro_batch_size": 8,
        "num_epochs": 3,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "sequence_len": 1024,
        "excess_length_strategy": "truncate",
        "gradient_checkpointing": True,
    },
    adapter_defaults={"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    method_defaults={"simpo": {"rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5}},
    steps=(
        _datasets,
        _template,
        _simpo,
        _flash,
        _quantization,
        _adapter,
        precision,
        length,
        _reference,
        trackers,
        deepspeed,
        hub,
    ),
    method=_method,
)
