"""Recipes of TRL, the alignment-handbook and LLaMA-Factory in our keys.

TRL's and the handbook's files hold arguments of the same classes (`ModelConfig`, `ScriptArguments`, transformers'
`TrainingArguments` and the trainer's own); LLaMA-Factory's hold transformers' and its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.axolotl import is_off_number
from pipeline.config.changes import Change
from pipeline.errors import UserError
from strategies.registry import STRATEGIES
from strategies.trl_keys import TRLKeys

__all__ = ["DROPPED", "TOOLS", "Translation", "equivalent", "tool_of", "translate"]

Values = dict[str, Any]
Problem = tuple[str, str]


@dataclass(frozen=True)
class Translation:
    """A recipe in our keys, what was changed, and (key, message) of what a person has to settle."""

    values: Values
    changes: list[Change]
    problems: list[Problem]

    def add(self, found: Change | Problem) -> None:
        """Take over what a step has found."""
        if not isinstance(found, Change):
            self.problems.append(found)
            return
        for name, value in found.becomes.items():
            if self.values.setdefault(name, value) != value:
                self.problems.append((found.key, f"says {name}: {value}, and another key {self.values[name]}; keep one"))
        self.changes.append(found)


TRAINING: dict[str, str] = {
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": "dataset_num_proc",
    "model_name_or_path": "base_model",
}
"""Arguments of transformers' trainer, and of all three tools -> our keys."""
TRL: dict[str, str] = {
    **TRAINING,
    "model_revision": "revision_of_model",
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
LLAMA_FACTORY: dict[str, str] = {
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
"""Arguments of TRL's that become ours by more than a name -> where to look."""
LLAMA_ADVICE: dict[str, str] = {
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
FIRST = ("base_model", "rl", "datasets", "test_datasets")
"""Keys that a recipe begins with."""
TOOLS = {"TRL": TRL, "LLaMA-Factory": LLAMA_FACTORY}
"""Tool -> its names of our keys."""

DROPPED: dict[str, str] = {
    name: reason
    for reason, names in {
        "`prefray train` trains and evaluates by itself": "do_train do_eval do_predict eval_on_start",
        "it changes no result": (
            "log_level logging_first_step logging_strategy overwrite_output_dir overwrite_cache plot_loss use_liger_kernel "
            "padding_free include_num_input_tokens_seen use_fast_tokenizer low_cpu_mem_usage dataloader_pin_memory "
            "remove_unused_columns save_safetensors use_unsloth enable_liger_kernel lora_task_type"
        ),
        "`sequence_len` covers prompt and answer": "max_prompt_length max_target_length",
        "`prefray train --resume` continues a run": "resume_from_checkpoint",
        "answers are generated by `prefray evaluate`": "generate_during_eval predict_with_generate",
    }.items()
    for name in names.split()
}
"""Arguments that are left out -> why."""
Found = Iterator[Change | Problem]
DEFAULTS: dict[str, Values] = {
    "TRL": {
        "learning_rate": 1e-6,
        "micro_batch_size": 8,
        "num_epochs": 3,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "sequence_len": 1024,
        "excess_length_strategy": "truncate",
        "gradient_checkpointing": True,
    },
    "LLaMA-Factory": {
        "learning_rate": 5e-5,
        "micro_batch_size": 8,
        "num_epochs": 3,
        "lr_scheduler": "linear",
        "warmup_steps": 0,
        "sequence_len": 2048,
        "excess_length_strategy": "truncate",
        "gradient_checkpointing": True,
    },
}
"""What a tool does where its recipe doesn't say, and ours would do otherwise."""
ADAPTER_DEFAULTS: dict[str, Values] = {
    "TRL": {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "LLaMA-Factory": {"lora_r": 8, "lora_dropout": 0.0},
}
METHOD_DEFAULTS: dict[tuple[str, str], Values] = {
    ("TRL", "simpo"): {"rl_beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5},
    ("LLaMA-Factory", "simpo"): {"rl_beta": 0.1, "cpo_alpha": 0.0, "simpo_gamma": 0.5},
}
INSTEAD = {"warmup_steps": "warmup_ratio", "num_epochs": "max_steps"}
"""A key -> another that says the same thing."""
TRACKERS = ("wandb", "mlflow", "tensorboard", "trackio")
DEEPSPEED_FILE = re.compile(r"(?:ds_z|zero|deepspeed_zero)([123])(?:_(offload)\w*)?\w*\.(?:json|ya?ml)")
ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}


def tool_of(values: Mapping[str, Any]) -> str:
    """Whose recipe it is, by the keys that only one has: Axolotl, TRL or LLaMA-Factory."""
    if values.keys() & {"finetuning_type", "stage", "cutoff_len", "pref_beta"}:
        return "LLaMA-Factory"
    return "TRL" if values.keys() & {"model_name_or_path", "dataset_mixer", "dataset_mixture"} else "Axolotl"


def equivalent(name: str) -> tuple[str, str] | None:
    """Tool and our key of an argument of TRL's or LLaMA-Factory's; None for other names."""
    for tool, table in (*TOOLS.items(), ("TRL", ADVICE), ("LLaMA-Factory", LLAMA_ADVICE)):
        if name in table:
            return tool, table[name]
    return None


def translate(values: Mapping[str, Any], tool: str, rl: str | None = None) -> Translation:
    """A recipe of TRL's or LLaMA-Factory's in our keys.

    Args:
        values: the recipe.
        tool: as `tool_of` says.
        rl: the method, where the recipe doesn't say it.

    Raises:
        UserError: for a recipe of something else than preferences, and for a value that can't be what its key takes.
    """
    left = {name: value for name, value in values.items() if value is not None and not is_off_number(name, value)}
    made = Translation({}, [], [])
    if "max_length" in values and values["max_length"] is None:
        made.problems.append(("sequence_len", "the recipe sets no limit (max_length: null); give the most tokens of a row"))
    for translate_some in (*STEPS[tool], _method(tool, rl), _renamed(TOOLS[tool])):
        for found in translate_some(left):
            made.add(found)
    for name in [name for name in left if name in made.values and left[name] != made.values[name]]:
        made.problems.append((name, f"{left[name]} and {made.values[name]} stand in the recipe; keep one"))
    whole = {**left, **made.values}
    _move_to_trl(whole)
    for name, value in _defaults(tool, whole).items():
        if name not in whole and INSTEAD.get(name) not in whole:
            whole[name] = value
            made.changes.append(Change(name, "not set", {name: value}, f"{tool}'s default"))
    ordered = {**{name: whole[name] for name in FIRST if name in whole}, **whole}
    return Translation(ordered, made.changes, made.problems)


def _defaults(tool: str, values: Values) -> Values:
    """What the tool does where this recipe doesn't say."""
    adapter = ADAPTER_DEFAULTS[tool] if "adapter" in values else {}
    return {**DEFAULTS[tool], **adapter, **METHOD_DEFAULTS.get((tool, str(values.get("rl"))), {})}


def _move_to_trl(values: Values) -> None:
    """The keys of grpo have a section."""
    names = [name for name in values if name in TRLKeys.model_fields and name != "beta"] if values.get("rl") == "grpo" else []
    if names:
        values["trl"] = {name: values.pop(name) for name in names}


def _taken(values: Values, *names: str) -> Values:
    """Those of these keys that there are, taken out."""
    return {name: values.pop(name) for name in names if name in values}


def _method(tool: str, rl: str | None) -> Callable[[Values], Found]:
    if rl is not None and rl not in STRATEGIES:
        raise UserError(f"--rl: must be one of {', '.join(STRATEGIES)}, got {rl!r}")
    return _method_of_trl(rl) if tool == "TRL" else _method_of_llama_factory(rl)


def _method_of_trl(rl: str | None) -> Callable[[Values], Found]:
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


def _method_of_llama_factory(rl: str | None) -> Callable[[Values], Found]:
    def method(values: Values) -> Found:
        stage, loss = values.pop("stage", None), values.pop("pref_loss", "sigmoid")
        if stage not in ("dpo", "kto"):
            raise UserError(f"stage: {stage or 'not given'} is not training on preferences; dpo and kto are")
        found = loss if stage == "dpo" and loss in ("orpo", "simpo") else stage
        if rl not in (None, found):
            raise UserError(f"--rl: got {rl}, and the recipe says {found}; leave it out")
        yield Change("stage" if found == stage else "pref_loss", found, {"rl": found}, "its name here")
        if found == "dpo" and loss != "sigmoid":
            yield Change("pref_loss", loss, {"dpo_loss_type": [loss]}, "its name here")

    return method


def _renamed(table: Mapping[str, str]) -> Callable[[Values], Found]:
    def renamed(values: Values) -> Found:
        for name in [name for name in values if name in table]:
            yield Change(name, value := values.pop(name), {table[name]: value}, "its name here")
        for name in [name for name in values if name in DROPPED]:
            yield Change(name, values.pop(name), {}, DROPPED[name])

    return renamed


def _trackers(values: Values) -> Found:
    given = values.pop("report_to", None)
    if given is None:
        return
    names = given if isinstance(given, list) else [given]
    known = {f"use_{name}": True for name in names if name in TRACKERS}
    yield Change("report_to", given, known, "a key of each tracker" if known else "no tracker of these is there")


def _precision(values: Values) -> Found:
    for name, value in _taken(values, "dtype", "torch_dtype", "pure_bf16").items():
        half = value in (True, "bfloat16")
        if half:
            values.pop("bf16", None)
        if value == "auto":
            yield name, "auto is the checkpoint's type, and weights are float32 here; give bf16: full for bfloat16"
        yield Change(name, value, {"bf16": "full"} if half else {}, "weights in bfloat16" if half else "weights are float32")


def _adapter(values: Values) -> Found:
    kind = "qlora" if values.get("load_in_4bit") else "lora"
    given = _taken(values, "use_peft")
    if given.get("use_peft"):
        yield Change("use_peft", True, {"adapter": kind}, "its name here")
    elif given:
        yield Change("use_peft", False, {}, "all weights are trained without an adapter")
        for name, value in _taken(values, *(name for name in list(values) if name.startswith("lora_"))).items():
            yield Change(name, value, {}, "without an adapter it has no effect")


def _length(values: Values) -> Found:
    for name, value in _taken(values, "truncation_mode").items():
        yield Change(name, value, {"excess_length_strategy": "truncate"}, "answers are cut at their end")
    for name, value in _taken(values, "cutoff_len").items():
        yield Change(name, value, {"sequence_len": value, "excess_length_strategy": "truncate"}, "longer rows are cut")


def _deepspeed(values: Values) -> Found:
    given = values.get("deepspeed")
    match = DEEPSPEED_FILE.search(given) if isinstance(given, str) else None
    if match:
        stage = f"zero{match[1]}" + ("_offload" if match[2] else "")
        yield Change("deepspeed", values.pop("deepspeed"), {"deepspeed": stage}, "the stage has a name")


def _template(values: Values) -> Found:
    """The handbook gives a template's text."""
    given = values.get("chat_template")
    if isinstance(given, str) and "{" in given:
        values.pop("chat_template")
        yield Change("chat_template", given, {"chat_template": "jinja", "chat_template_jinja": given}, "a template's text")


def _hub(values: Values) -> Found:
    """A model is pushed where `push_to_hub` says so; here, where `hub_model_id` is given."""
    pushes = values.pop("push_to_hub", False)
    if pushes:
        yield Change("push_to_hub", pushes, {}, "`hub_model_id` says it")
        if "hub_model_id" not in values:
            yield "hub_model_id", "push_to_hub is on; name the repository"
        return
    for name, value in _taken(values, *(name for name in list(values) if name.startswith("hub_"))).items():
        yield Change(name, value, {}, "push_to_hub is off")


def _reference(values: Values) -> Found:
    for name, value in _taken(values, "precompute_ref_log_probs").items():
        if not isinstance(value, bool):
            raise UserError(f"{name}: must be true or false, got {value!r}")
        yield Change(name, value, {"reference": "cached"} if value else {}, "its name here" if value else "it is off")


def _simpo(values: Values) -> Found:
    """SimPO's own code gives the margin as a multiple of beta."""
    for name, ratio in _taken(values, "gamma_beta_ratio").items():
        beta = values.get("beta", 0.1)
        yield Change(name, ratio, {"simpo_gamma": ratio * beta}, f"times beta {beta}")


def _flash(values: Values) -> Found:
    for name, value in _taken(values, "use_flash_attention_2").items():
        becomes = {"attn_implementation": "flash_attention_2"} if value else {}
        yield Change(name, value, becomes, "its name here" if value else "it is off")


def _datasets(values: Values) -> Found:
    """`dataset_name` with its splits, or the handbook's mixer or mixture."""
    given = _taken(values, "dataset_name", "dataset_mixer", "dataset_mixture")
    splits = values.pop("dataset_splits", [])
    train, test, config = (values.pop(name, None) for name in ("dataset_train_split", "dataset_test_split", "dataset_config"))
    if not isinstance(splits, list) or not all(isinstance(one, str) for one in splits):
        raise UserError(f"dataset_splits: must be a list of names, got {splits!r}")
    train = train or next((one for one in splits if "train" in one), "train")
    test = test or next((one for one in splits if "test" in one), None)
    for key, value in given.items():
        entries, parts = _entries(key, value, config, train)
        becomes: Values = {"datasets": entries}
        if test:
            becomes["test_datasets"] = [{**entry, "split": test} for entry in entries]
        yield Change(key, value, becomes, "a list here")
        for path, part in parts.items():
            yield "datasets", f"{part:g} of {path} is asked for; write a slice, such as split: {train}[:1000]"


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


def _llama_datasets(values: Values) -> Found:
    """Names of `dataset_info.json`, whose rows are conversations as in LLaMA-Factory's own examples."""
    folder, limit = values.pop("dataset_dir", "data"), values.pop("max_samples", None)
    if limit is not None and (isinstance(limit, bool) or not str(limit).isdigit()):
        raise UserError(f"max_samples: must be a number, got {limit!r}")
    is_labelled = values.get("stage") == "kto"
    for key, ours in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
        given = values.pop(key, None)
        if given is None:
            continue
        names = _names(key, given)
        part = {} if limit is None else {"split": f"train[:{limit}]"}
        paths = [f"{folder}/{name.removesuffix('.json')}.json" for name in names]
        entries = [{"path": path, **part, **SHAPES["desirable" if is_labelled else "ranking"]} for path in paths]
        yield Change(key, given, {ours: entries}, "files of dataset_dir, with the columns of LLaMA-Factory's examples")
        yield ours, "compare paths and columns with dataset_info.json"


SHAPES: dict[str, Values] = {
    "ranking": {
        "type": "chat_template.default",
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    },
    "desirable": {"type": "chat_template.default", "field_messages": "messages", "field_label": "label"},
}
"""How LLaMA-Factory's own examples have their rows."""


def _names(key: str, given: Any) -> list[str]:
    """Names in a list, or in one text with commas."""
    names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key}: must be names, got {given!r}")
    return names


def _finetuning(values: Values) -> Found:
    kind, bits = values.pop("finetuning_type", "lora"), _number(values, "quantization_bit")
    if bits not in (None, 4, 8):
        raise UserError(f"quantization_bit: must be 4 or 8, got {bits}")
    rank = _number(values, "lora_rank") or 8
    values["lora_rank"] = rank
    if bits is not None:
        yield Change("quantization_bit", bits, {f"load_in_{bits}bit": True}, "its name here")
    if kind == "lora":
        yield Change("finetuning_type", kind, {"adapter": "qlora" if bits == 4 else "lora"}, "its name here")
        if "lora_alpha" not in values:
            yield Change("lora_alpha", "not set", {"lora_alpha": 2 * rank}, "twice the rank, LLaMA-Factory's default")
    elif kind == "full":
        yield Change("finetuning_type", kind, {}, "all weights are trained without an adapter")
        for name, value in _taken(values, *(name for name in list(values) if name.startswith("lora_"))).items():
            yield Change(name, value, {}, "without an adapter it has no effect")
    else:
        values["finetuning_type"] = kind
    target = values.pop("lora_target", None)
    if target == "all":
        yield Change("lora_target", target, {"lora_target_linear": True}, "its name here")
    elif target is not None:
        yield Change("lora_target", target, {"lora_target_modules": _names("lora_target", target)}, "a list here")
    for name, value in _taken(values, "additional_target").items():
        yield Change(name, value, {"lora_modules_to_save": _names(name, value)}, "a list here")


def _number(values: Values, name: str) -> int | None:
    """A whole number, also as text, taken out of the recipe."""
    value = values.pop(name, None)
    if value is not None and (isinstance(value, bool) or not str(value).isdigit()):
        raise UserError(f"{name}: must be a whole number, got {value!r}")
    return None if value is None else int(value)


def _llama_model(values: Values) -> Found:
    for name, value in _taken(values, "template").items():
        yield Change(name, value, {}, "the tokenizer's own chat template is used; set chat_template for another")
    for name, value in _taken(values, "disable_gradient_checkpointing").items():
        yield Change(name, value, {"gradient_checkpointing": not value}, "its name here")
    for name, value in _taken(values, "flash_attn").items():
        ours = ATTENTION.get(str(value))
        why = "its name here" if ours else "the hardware chooses"
        yield Change(name, value, {"attn_implementation": ours} if ours else {}, why)


STEPS: dict[str, tuple[Callable[[Values], Found], ...]] = {
    "TRL": (_datasets, _template, _simpo, _flash, _adapter, _precision, _length, _reference, _trackers, _deepspeed, _hub),
    "LLaMA-Factory": (_llama_datasets, _finetuning, _llama_model, _precision, _length, _trackers, _deepspeed, _hub),
}
"""Translations that take more than a name; each takes what it translates out of the recipe."""
