"""Translation of Axolotl's recipes: keys with an equivalent are translated, those that change no result left out, with notes.

A recipe with another unsupported key is rejected with the reason (`REASONS`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from cluster.sharding import STAGES
from pipeline.config.axolotl.keys import (
    DEEPSPEED_FILE,
    FSDP1_KEYS,
    FSDP_WORDS,
    KERNEL_PLUGINS,
    NAME,
    NAMES,
    NEUTRAL_KEYS,
    OFF_NUMBERS,
    OFF_WITH,
    OFF_WORDS,
    OLD_VALUES,
    REASONS,
    RENAMED,
    SECTIONS,
    SHARDING_STRATEGIES,
    UNUSUAL_LAYERS,
    USER_DEFINED,
    Values,
)
from pipeline.config.changes import Change
from pipeline.data.dataset_keys import DatasetConfig, UserDefinedType
from strategies.methods.trl_keys import TRLKeys, VLLMKeys

__all__ = ["NEUTRAL_KEYS", "REASONS", "RENAMED", "is_off_number", "translated", "without_sharding_of_one"]


def translated(values: Mapping[str, Any], model: type[BaseModel]) -> tuple[Values, list[Change]]:
    """Translate a recipe of Axolotl's to our keys; returns it with the changes.

    Keys that are empty, or off and unsupported, are left out: a recipe may state that it doesn't use a feature.
    """
    without, ineffective = _without_ineffective(values)
    # `model` is the class of the built-in keys: keys of plugins aren't known before `plugins` has been read.
    kept, changes = _cleaned(without, model, "")
    changes = ineffective + changes
    if values.get("fsdp", True) in (None, False, "", []) and not values.get("fsdp_config"):
        kept.pop("fsdp_config", None)  # an empty section alone would select FSDP2's defaults
    # Each translation sees the result of those before it.
    for translate in TRANSLATIONS:
        changes += translate(kept)
    return kept, changes


def _without_ineffective(values: Mapping[str, Any]) -> tuple[Values, list[Change]]:
    """Remove the dependent keys of a main key that is off or empty (`OFF_WITH`)."""
    kept, changes = dict(values), []
    for main, prefixes in OFF_WITH.items():
        # Only a main key that is given and empty says "off"; an absent one has its default.
        if main not in values or not _is_blank(values[main]) or (main == "val_set_size" and values.get("test_datasets")):
            continue
        if main == "wandb_project" and values.get("use_wandb"):
            continue
        # `lora_model_dir` begins with a prefix of `adapter`, but names weights.
        for name in [name for name in kept if name.startswith(prefixes) and name not in (main, "lora_model_dir")]:
            if not _is_blank(value := kept.pop(name)):
                changes.append(Change(name, value, {}, f"`{main}` is off or empty"))
    return kept, changes


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float | str | list) and not value)


def _cleaned(values: Mapping[str, Any], model: type[BaseModel], section: str) -> tuple[Values, list[Change]]:
    """Remove empty, off and neutral keys and rename others to ours, also in the entries of `datasets` and in sections."""
    kept: Values = {}
    changes: list[Change] = []
    for name, value in values.items():
        path = f"{section}{name}"
        is_known = name in model.model_fields
        # Axolotl's recipes list many keys without a value.
        if value is None or _is_off(path, value, is_known):
            continue
        if not is_known and path in NEUTRAL_KEYS:
            changes.append(Change(path, value, {}, NEUTRAL_KEYS[path]))
        elif not is_known and not section and name in RENAMED:
            ours = RENAMED[name]
            # Both names may be given: equal values are one setting, different ones contradict.
            wins = values[ours] if values.get(ours) is not None else kept.setdefault(ours, value)
            if wins == value:
                changes.append(Change(name, value, {ours: wins}, "its name here"))
            else:
                kept[name] = value  # validation will reject it
        elif isinstance(value, str) and value in OLD_VALUES.get(name, {}):
            kept[name] = OLD_VALUES[name][value]
            changes.append(Change(path, value, {path: kept[name]}, "its name here"))
        else:
            kept[name] = value
    for name in ("datasets", "test_datasets"):
        if not section and isinstance(kept.get(name), list):
            kept[name] = [_cleaned_entry(entry, f"{name}.{index}.", changes) for index, entry in enumerate(kept[name])]
    for name, keys in (("trl", TRLKeys), ("vllm", VLLMKeys)):
        if not section and isinstance(kept.get(name), Mapping):
            kept[name], more = _cleaned(kept[name], keys, f"{name}.")
            changes += more
    return kept, changes


def _cleaned_entry(entry: Any, path: str, changes: list[Change]) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    kept, more = _cleaned(entry, DatasetConfig, "")
    # Axolotl's form for files without a folder: the format is the path, as in `load_dataset`.
    if "path" not in kept and kept.get("ds_type") and kept.get("data_files"):
        kept["path"] = kept["ds_type"]
    if kept.get("type") in USER_DEFINED and (
        nested := {name: kept.pop(name) for name in UserDefinedType.model_fields if name in kept}
    ):
        more.append(Change("type", kept["type"], {"type": nested}, "its keys stand under it"))
        kept["type"] = nested
    for change in more:
        becomes = {f"{path}{name}": value for name, value in change.becomes.items()}
        changes.append(Change(f"{path}{change.key}", change.value, becomes, change.why))
    return kept


def _is_off(path: str, value: Any, is_known: bool) -> bool:
    """Return whether a value means that the recipe doesn't use the feature."""
    if is_off_number(path, value) or value in ("", *OFF_WORDS.get(path, ())) or (path in SECTIONS and value in (False, [])):
        return True
    # `false` means "not used" for a foreign key alone; for our own it is a value.
    unsupported = not is_known and (path in REASONS or path in NEUTRAL_KEYS)
    return unsupported and (value is False or value in ([], {}))


def is_off_number(name: str, value: Any) -> bool:
    """Return whether a number turns the feature of a key off."""
    # bool is an int, and `False in (0,)` is true.
    return isinstance(value, int | float) and not isinstance(value, bool) and value in OFF_NUMBERS.get(name, ())


def _attention(values: Values) -> list[Change]:
    # Contradicting keys are left unchanged, for validation to reject.
    changes = []
    for key, ours in (("sdp_attention", "sdpa"), ("eager_attention", "eager"), ("flex_attention", "flex_attention")):
        if values.get(key) is True and values.get("attn_implementation") in (None, ours):
            values["attn_implementation"] = ours
            changes.append(Change(key, values.pop(key), {"attn_implementation": ours}, "its name here"))
    return changes


def _reference(values: Values) -> list[Change]:
    key = "precompute_ref_log_probs"
    if values.get(key) is not True or values.get("reference") not in (None, "cached"):
        return []
    values["reference"] = "cached"
    return [Change(key, values.pop(key), {"reference": "cached"}, "its name here")]


def _method(values: Values) -> list[Change]:
    if values.get("rl") is not True:
        return []
    values["rl"] = "dpo"
    return [Change("rl", True, {"rl": "dpo"}, "what it meant before there were other methods")]


def _compile(values: Values) -> list[Change]:
    if values.get("torch_compile") != "auto":
        return []
    return [Change("torch_compile", values.pop("torch_compile"), {}, "nothing is compiled, which changes no result")]


def _hub(values: Values) -> list[Change]:
    if values.get("push_to_hub") is not True or not values.get("hub_model_id"):
        return []
    return [Change("push_to_hub", values.pop("push_to_hub"), {}, "`hub_model_id` says it")]


def without_sharding_of_one(values: Values) -> list[Change]:
    """Remove sharding from a recipe without a number of workers, which Axolotl's launcher sets, and which is 1 here."""
    ray, tune = values.get("ray"), values.get("tune")
    worker_counts = [values.get("ray_num_workers"), isinstance(ray, Mapping) and ray.get("num_workers")]
    space = tune.get("space") if isinstance(tune, Mapping) else None
    # The number may also be searched.
    if any(worker_counts) or (isinstance(space, Mapping) and {"ray.num_workers", "ray_num_workers"} & space.keys()):
        return []
    value = values.get("deepspeed")
    if isinstance(value, str) and value not in STAGES and not os.path.exists(value):
        return []  # validation will reject it
    why = "there is one worker, and nothing to divide the model among; set ray.num_workers to the GPUs to use"
    return [Change(key, values.pop(key), {}, why) for key in ("deepspeed", "fsdp_config") if key in values]


def _checkpointing(values: Values) -> list[Change]:
    value = values.get("gradient_checkpointing")
    if value not in ("unsloth", "offload", "offload_disk"):
        return []
    values["gradient_checkpointing"] = True
    return [Change("gradient_checkpointing", value, {"gradient_checkpointing": True}, "activations aren't offloaded")]


def _reentrant(values: Values) -> list[Change]:
    value = values.get("gradient_checkpointing_kwargs")
    if not isinstance(value, Mapping) or value.get("use_reentrant") is not True or values.get("deepspeed"):
        return []
    key = "gradient_checkpointing_kwargs"
    values[key] = {**value, "use_reentrant": False}
    return [
        Change(f"{key}.use_reentrant", True, {f"{key}.use_reentrant": False}, "DDP fails with the other, and results are equal")
    ]


def _modules(values: Values) -> list[Change]:
    # Named layers are redundant with `lora_target_linear`.
    key, changes = "lora_target_modules", []
    value = values.get(key)
    if isinstance(value, str) and NAMES.fullmatch(value):  # PEFT would read a string as one regular expression
        values[key] = NAME.findall(value)
        changes.append(Change(key, value, {key: values[key]}, "names are a list here"))
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if values.get("lora_target_linear") is True and names and not any(UNUSUAL_LAYERS.search(str(name)) for name in names):
        changes = [Change(key, value, {}, "`lora_target_linear` has all linear layers")]
        del values[key]
    return changes


def _kernel_plugins(values: Values) -> list[Change]:
    plugins = values.get("plugins")
    if not isinstance(plugins, list):
        return []
    kernel_plugins = [name for name in plugins if isinstance(name, str) and name.startswith(KERNEL_PLUGINS)]
    if kernel_plugins:
        values["plugins"] = [name for name in plugins if name not in kernel_plugins]
        if not values["plugins"]:
            del values["plugins"]
    return [Change("plugins", name, {}, "it brings kernels of Axolotl's, which change no result") for name in kernel_plugins]


def _deepspeed(values: Values) -> list[Change]:
    value = values.get("deepspeed")
    if not isinstance(value, str) or os.path.exists(value):
        return []
    if (match := DEEPSPEED_FILE.fullmatch(os.path.basename(value))) is None:
        return []
    values["deepspeed"] = f"zero{match[1]}" + ("_offload" if match[2] else "")
    return [Change("deepspeed", value, {"deepspeed": values["deepspeed"]}, "Axolotl's file of that stage isn't here")]


def _fsdp(values: Values) -> list[Change]:
    """Translate `fsdp:` and keys of FSDP 1 to the section of FSDP 2; other values are left for validation to reject."""
    section, words = values.get("fsdp_config", {}), values.get("fsdp", [])
    words = words.split() if isinstance(words, str) else words
    # A word without an equivalent leaves the whole section as it is.
    if not isinstance(section, Mapping) or not isinstance(words, list) or not set(map(str, words)) <= FSDP_WORDS.keys():
        return []
    kept, changes = _fsdp_section(section)
    for key in ("fsdp_version", "fsdp_final_state_dict_type"):
        if (value := values.pop(key, None)) is not None:
            name = key if key == "fsdp_version" else key.removeprefix("fsdp_")
            kept.setdefault(name, 2 if (key, value) == ("fsdp_version", 1) else value)
            changes.append(Change(key, value, {f"fsdp_config.{name}": kept[name]}, "it belongs to the section"))
    if words:
        requested = {name: value for word in words for name, value in FSDP_WORDS[word].items()}
        # The section is more specific than the words.
        kept = {**requested, **kept}
        becomes = {f"fsdp_config.{name}": value for name, value in requested.items()} or {"fsdp_config": "FSDP2"}
        changes.append(Change("fsdp", values.pop("fsdp"), becomes, "FSDP2 divides whole layers"))
    if kept or words or changes:
        values["fsdp_config"] = kept
    return changes


def _fsdp_section(section: Mapping[Any, Any]) -> tuple[Values, list[Change]]:
    """Translate a section to FSDP2's names. Of two names of one key, the foreign one stays, for validation to reject."""
    kept: Values = {}
    changes = []
    for key, value in section.items():
        name = key if key == "fsdp_version" else str(key).removeprefix("fsdp_")
        path = f"fsdp_config.{key}"
        strategy = SHARDING_STRATEGIES.get(str(value).upper()) if name == "sharding_strategy" else None
        if value is None:
            continue
        if name in FSDP1_KEYS:
            changes.append(Change(path, value, {}, FSDP1_KEYS[name]))
        elif strategy is not None and section.get("reshard_after_forward") in (None, strategy):
            kept["reshard_after_forward"] = strategy
            changes.append(Change(path, value, {"fsdp_config.reshard_after_forward": strategy}, "FSDP2's name"))
        elif name == "state_dict_type" and value == "FULL_STATE_DICT":
            changes.append(Change(path, value, {}, "checkpoints hold each worker's part; the trained model is written whole"))
        elif name == "fsdp_version" and value == 1:
            changes.append(Change(path, value, {}, "FSDP2 takes its place"))
        elif name != key and name not in section:
            kept[name] = value
            changes.append(Change(path, value, {f"fsdp_config.{name}": value}, "its name here"))
        else:
            kept[key] = value
    return kept, changes


TRANSLATIONS: tuple[Callable[[Values], Iterable[Change]], ...] = (
    _method,
    _compile,
    _hub,
    _attention,
    _reference,
    _checkpointing,
    _reentrant,
    _modules,
    _kernel_plugins,
    _deepspeed,
    _fsdp,
)
"""Each changes a recipe in place and returns its changes."""
