"""Translation of TRL's recipes, and of the alignment-handbook's, which have arguments of the same classes.

Those are `ModelConfig`, `ScriptArguments`, transformers' `TrainingArguments` and the trainer's own arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
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


ARGUMENTS_OF = {
    "kto": {"desirable_weight", "undesirable_weight"},
    "grpo": {"num_generations", "reward_funcs", "reward_weights", "steps_per_generation"},
    "simpo": {"gamma_beta_ratio"},
}
"""Method of TRL -> arguments that only it has."""
LOSSES_OF = {"simpo": "simpo", "kto": "kto", "apo_zero_unpaired": "kto"}
"""`loss_type` -> the method that it belongs to."""
LOSSES_OF_METHODS = {"kto": ("kto",), "simpo": ("simpo", "sigmoid"), "orpo": ("orpo",), "grpo": ()}
"""Method -> values of `loss_type` that mean the method itself; grpo has its own losses."""
SIMPO_BETA = 2.0
"""Default beta of SimPO's own code."""


def _method(rl: str | None) -> Step:
    def method(values: Values) -> Results:
        loss = values.pop("loss_type", None)
        # TRL takes several losses with weights.
        losses = loss if isinstance(loss, list) else [loss]
        # The method follows from --rl, else the loss, else arguments that only one trainer has.
        by_arguments = next((method for method, names in ARGUMENTS_OF.items() if values.keys() & names), None)
        by_loss = LOSSES_OF.get(losses[0]) if len(losses) == 1 else None
        if (rl or by_loss or by_arguments) in LOSSES_OF_METHODS:
            final = rl or by_loss or by_arguments
            if loss is not None and final == "grpo":
                yield Change("loss_type", loss, {"loss_type": loss}, "a key of the section trl here")
            elif loss is not None:
                yield Change("loss_type", loss, {"rl": final}, "a method of its own")
                if unknown := [name for name in losses if name not in LOSSES_OF_METHODS[str(final)]]:
                    yield "rl", f"{final} has no loss {unknown[0]!r} here; take the loss out, or another method"
        else:
            final = rl or "dpo"
            if loss is not None:
                yield Change("loss_type", loss, {"dpo_loss_type": losses}, "its name here")
        why = (
            "--rl says it" if rl else "by its arguments" if final != "dpo" else "the file doesn't say it; give --rl for another"
        )
        yield Change("rl", "not set", {"rl": final}, why)
        # After the method: `gamma_beta_ratio` is among the arguments that identify simpo.
        yield from _simpo(values)

    return method


def _template(values: Values) -> Results:
    # The handbook's `chat_template` is the text of a template.
    text = values.get("chat_template")
    if isinstance(text, str) and "{" in text:
        values.pop("chat_template")
        yield Change("chat_template", text, {"chat_template": "jinja", "chat_template_jinja": text}, "a template's text")


def _simpo(values: Values) -> Results:
    """Translate SimPO's own code: its margin is a multiple of beta, and its `sft_weight` is our `cpo_alpha`."""
    for name, value in taken(values, "gamma_beta_ratio").items():
        # Stored, since `_renamed` translates beta after this step.
        ratio, beta = _number(name, value), _number("beta", values.setdefault("beta", SIMPO_BETA))
        yield Change(name, value, {"simpo_gamma": ratio * beta}, f"times beta {beta}")
        weight = values.pop("sft_weight", None)
        origin = ("not set", "SimPO's own default") if weight is None else (weight, "its name here")
        yield Change("sft_weight", origin[0], {"cpo_alpha": weight or 0.0}, origin[1])


def _flash(values: Values) -> Results:
    for name, value in taken(values, "use_flash_attention_2").items():
        becomes = {"attn_implementation": "flash_attention_2"} if value else {}
        yield Change(name, value, becomes, "its name here" if value else "it is off")


def _quantization(values: Values) -> Results:
    for name, value in taken(values, "bnb_4bit_quant_type").items():
        becomes = {"bnb_config_kwargs": {name: value}} if values.get("load_in_4bit") else {}
        yield Change(name, value, becomes, "an argument of bitsandbytes" if becomes else "nothing is quantized")


def _adapter(values: Values) -> Results:
    kind = "qlora" if values.get("load_in_4bit") else "lora"
    arguments = taken(values, "use_peft")
    if arguments.get("use_peft"):
        yield Change("use_peft", True, {"adapter": kind}, "its name here")
    # use_peft: false, beside LoRA keys that TRL would ignore.
    elif arguments:
        yield Change("use_peft", False, {}, "all weights are trained without an adapter")
        for name, value in taken(values, *(name for name in list(values) if name.startswith("lora_"))).items():
            yield Change(name, value, {}, "without an adapter it has no effect")


def _reference(values: Values) -> Results:
    for name, value in taken(values, "precompute_ref_log_probs").items():
        if not isinstance(value, bool):
            raise UserError(f"{name}: must be true or false, got {value!r}")
        yield Change(name, value, {"reference": "cached"} if value else {}, "its name here" if value else "it is off")


def _datasets(values: Values) -> Results:
    """Translate `dataset_name` with its splits, or the handbook's mixer or mixture."""
    arguments = taken(values, "dataset_name", "dataset_mixer", "dataset_mixture")
    splits = values.pop("dataset_splits", [])
    train, test, config = (values.pop(name, None) for name in ("dataset_train_split", "dataset_test_split", "dataset_config"))
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"dataset_splits: must be a list of names, got {splits!r}")
    train = train or next((split for split in splits if "train" in split), "train")
    test = test or next((split for split in splits if "test" in split), None)
    for key, value in arguments.items():
        entries = _entries(key, value, config, train)
        for entry in entries:
            if (part := entry.pop("part")) != 1:  # a fraction; the split is rejected until it is a number of rows
                yield (
                    "datasets",
                    f"{part:g} of {entry['path']} is asked for; write a number of rows: split: {entry['split']}[:1000]",
                )
                entry["split"] = f"{entry['split']}[:{part:.0%}]"
        becomes: Values = {"datasets": entries}
        held_out = value.get("test_split_size") if key == "dataset_mixture" else None
        if held_out:
            yield Change(f"{key}.test_split_size", held_out, {"val_set_size": held_out}, "its name here")
        elif test or values.get("eval_strategy") not in (None, "no", False):
            becomes["test_datasets"] = [{**entry, "split": test or "test"} for entry in entries]  # TRL's default
        yield Change(key, value, becomes, "a list here")
        if key == "dataset_mixture":
            yield from _of_mixture(value)


def _of_mixture(value: Mapping[str, Any]) -> Results:
    if value.get("seed") is not None:
        yield Change("dataset_mixture.seed", value["seed"], {}, "`seed` shuffles and splits the rows")
    if columns := [item["columns"] for item in value["datasets"] if item.get("columns")]:
        yield Change("dataset_mixture.datasets.columns", columns, {}, "columns are found by the rows' type")


def _entries(key: str, value: Any, config: Any, split: str) -> list[Values]:
    """Return entries of `datasets` for an argument, with the requested fraction of each as `part`."""
    named = {"name": config} if config else {}
    if key == "dataset_name" and isinstance(value, str):
        return [{"path": value, **named, "split": split, "part": 1.0}]
    if key == "dataset_mixer" and isinstance(value, Mapping):
        return [{"path": path, **named, "split": split, "part": _number(f"{key}.{path}", part)} for path, part in value.items()]
    listed = value.get("datasets") if key == "dataset_mixture" and isinstance(value, Mapping) else None
    if (
        isinstance(listed, list)
        and listed
        and all(isinstance(item, Mapping) and isinstance(item.get("id"), str) for item in listed)
    ):
        return [
            {
                "path": item["id"],
                **({"name": item["config"]} if item.get("config") else {}),
                "split": item.get("split") or split,
                "part": _number(f"{key}.{item['id']}", 1 if item.get("weight") is None else item["weight"]),
            }
            for item in listed
        ]
    takes = {"dataset_name": "a name", "dataset_mixer": "data sets and their parts"}.get(key, "`datasets:` with an id each")
    raise UserError(f"{key}: must be {takes}, got {str(value)[:80]!r}")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key}: must be a number, got {value!r}")
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
