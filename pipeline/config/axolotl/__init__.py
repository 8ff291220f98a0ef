"""Recipes of Axolotl's in our keys: what has an equivalent is translated, what changes no result is left out, each with a note.

A recipe with one of the other keys is refused with the reason (`REASONS`).
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
    NAME,
    NAMES,
    NEUTRAL_KEYS,
    OFF_NUMBERS,
    OFF_WITH,
    OFF_WORDS,
    OLD_VALUES,
    OWN_PLUGINS,
    REASONS,
    RENAMED,
    SECTIONS,
    SHARDING_STRATEGIES,
    UNUSUAL_LAYERS,
    Values,
)
from pipeline.config.changes import Change
from pipeline.config.datasets import DatasetConfig
from strategies.trl_keys import TRLKeys, VLLMKeys

__all__ = ["NEUTRAL_KEYS", "REASONS", "RENAMED", "is_off_number", "translated", "without_sharding_of_one"]


def translated(values: Mapping[str, Any], model: type[BaseModel]) -> tuple[Values, list[Change]]:
    """A recipe of Axolotl's in our keys, and what was changed.

    What is empty, or off and unsupported, is left out: a recipe may say that it doesn't use a thing.
    """
    without, ineffective = _without_ineffective(values)
    kept, changes = _cleaned(without, model, "")
    changes = ineffective + changes
    if values.get("fsdp", True) in (None, False, "", []) and not values.get("fsdp_config"):
        kept.pop("fsdp_config", None)  # by itself, an empty section asks for FSDP2's defaults
    for translate in TRANSLATIONS:
        changes += translate(kept)
    return kept, changes


def _without_ineffective(values: Mapping[str, Any]) -> tuple[Values, list[Change]]:
    """Without the keys of a thing that the recipe has turned off, or left empty."""
    kept, changes = dict(values), []
    for main, beginnings in OFF_WITH.items():
        if main not in values or not _is_nothing(values[main]) or (main == "val_set_size" and values.get("test_datasets")):
            continue
        if main == "wandb_project" and values.get("use_wandb"):
            continue
        for name in [name for name in kept if name.startswith(beginnings) and name not in (main, "lora_model_dir")]:
            if not _is_nothing(value := kept.pop(name)):
                changes.append(Change(name, value, {}, f"`{main}` is off or empty"))
    return kept, changes


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float | str | list) and not value)


def _cleaned(values: Mapping[str, Any], model: type[BaseModel], section: str) -> tuple[Values, list[Change]]:
    """Without what is empty, off or neutral, and with our names; the entries of `datasets` and the sections as well."""
    kept: Values = {}
    changes: list[Change] = []
    for name, value in values.items():
        path = f"{section}{name}"
        known = name in model.model_fields
        if value is None or _is_off(path, value, known):
            continue
        if not known and path in NEUTRAL_KEYS:
            changes.append(Change(path, value, {}, NEUTRAL_KEYS[path]))
        elif not known and not section and name in RENAMED:
            ours = RENAMED[name]
            wins = values[ours] if values.get(ours) is not None else kept.setdefault(ours, value)
            if wins == value:
                changes.append(Change(name, value, {ours: wins}, "its name here"))
            else:
                kept[name] = value  # to be refused
        elif isinstance(value, str) and value in OLD_VALUES.get(name, {}):
            kept[name] = OLD_VALUES[name][value]
            changes.append(Change(path, value, {path: kept[name]}, "its name here"))
        else:
            kept[name] = value
    for name in ("datasets", "test_datasets"):
        if not section and isinstance(kept.get(name), list):
            kept[name] = [_entry(entry, f"{name}.{place}.", changes) for place, entry in enumerate(kept[name])]
    for name, keys in (("trl", TRLKeys), ("vllm", VLLMKeys)):
        if not section and isinstance(kept.get(name), Mapping):
            kept[name], more = _cleaned(kept[name], keys, f"{name}.")
            changes += more
    return kept, changes


def _entry(entry: Any, path: str, changes: list[Change]) -> Any:
    """An entry of `datasets`, cleaned."""
    if not isinstance(entry, Mapping):
        return entry
    kept, more = _cleaned(entry, DatasetConfig, "")
    if "path" not in kept and kept.get("ds_type") and kept.get("data_files"):
        kept["path"] = kept["ds_type"]
    for change in more:
        becomes = {f"{path}{name}": value for name, value in change.becomes.items()}
        changes.append(Change(f"{path}{change.key}", change.value, becomes, change.why))
    return kept


def _is_off(path: str, value: Any, known: bool) -> bool:
    """Whether a value says that the recipe doesn't use the thing."""
    if is_off_number(path, value) or value in ("", *OFF_WORDS.get(path, ())) or (path in SECTIONS and value in (False, [])):
        return True
    unsupported = not known and (path in REASONS or path in NEUTRAL_KEYS)
    return unsupported and (value is False or value in ([], {}))


def is_off_number(name: str, value: Any) -> bool:
    """Whether a number turns the thing off that a key is about."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value in OFF_NUMBERS.get(name, ())


def _attention(values: Values) -> list[Change]:
    """What contradicts is left, to be refused."""
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
    """Take out what divides a model where a recipe says no number of workers, which Axolotl's launcher gives."""
    ray, tune = values.get("ray"), values.get("tune")
    asked = [values.get("ray_num_workers"), isinstance(ray, Mapping) and ray.get("num_workers")]
    space = tune.get("space") if isinstance(tune, Mapping) else None
    if any(asked) or (isinstance(space, Mapping) and {"ray.num_workers", "ray_num_workers"} & space.keys()):
        return []
    given = values.get("deepspeed")
    if isinstance(given, str) and given not in STAGES and not os.path.exists(given):
        return []  # to be refused
    why = "there is one worker, and nothing to divide the model among; set ray.num_workers to the GPUs to use"
    return [Change(key, values.pop(key), {}, why) for key in ("deepspeed", "fsdp_config") if key in values]


def _checkpointing(values: Values) -> list[Change]:
    given = values.get("gradient_checkpointing")
    if given not in ("unsloth", "offload", "offload_disk"):
        return []
    values["gradient_checkpointing"] = True
    return [Change("gradient_checkpointing", given, {"gradient_checkpointing": True}, "activations aren't offloaded")]


def _reentrant(values: Values) -> list[Change]:
    given = values.get("gradient_checkpointing_kwargs")
    if not isinstance(given, Mapping) or given.get("use_reentrant") is not True or values.get("deepspeed"):
        return []
    key = "gradient_checkpointing_kwargs"
    values[key] = {**given, "use_reentrant": False}
    return [
        Change(f"{key}.use_reentrant", True, {f"{key}.use_reentrant": False}, "DDP fails with the other, and results are equal")
    ]


def _modules(values: Values) -> list[Change]:
    """With all linear layers, named ones are named twice."""
    key, changes = "lora_target_modules", []
    given = values.get(key)
    if isinstance(given, str) and NAMES.fullmatch(given):  # by itself PEFT takes it for one regular expression
        values[key] = NAME.findall(given)
        changes.append(Change(key, given, {key: values[key]}, "names are a list here"))
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    if values.get("lora_target_linear") is True and names and not any(UNUSUAL_LAYERS.search(str(name)) for name in names):
        changes = [Change(key, given, {}, "`lora_target_linear` has all linear layers")]
        del values[key]
    return changes


def _own_plugins(values: Values) -> list[Change]:
    plugins = values.get("plugins")
    if not isinstance(plugins, list):
        return []
    own = [name for name in plugins if isinstance(name, str) and name.startswith(OWN_PLUGINS)]
    if own:
        values["plugins"] = [name for name in plugins if name not in own]
        if not values["plugins"]:
            del values["plugins"]
    return [Change("plugins", name, {}, "it brings kernels of Axolotl's, which change no result") for name in own]


def _deepspeed(values: Values) -> list[Change]:
    given = values.get("deepspeed")
    if not isinstance(given, str) or os.path.exists(given):
        return []
    if (match := DEEPSPEED_FILE.fullmatch(os.path.basename(given))) is None:
        return []
    values["deepspeed"] = f"zero{match[1]}" + ("_offload" if match[2] else "")
    return [Change("deepspeed", given, {"deepspeed": values["deepspeed"]}, "Axolotl's file of that stage isn't here")]


def _fsdp(values: Values) -> list[Change]:
    """`fsdp:` and the keys of FSDP 1 as the section of FSDP 2; what is no such thing is left, to be refused."""
    section, words = values.get("fsdp_config", {}), values.get("fsdp", [])
    words = words.split() if isinstance(words, str) else words
    if not isinstance(section, Mapping) or not isinstance(words, list) or not set(map(str, words)) <= FSDP_WORDS.keys():
        return []
    kept, changes = _fsdp_section(section)
    for key in ("fsdp_version", "fsdp_final_state_dict_type"):
        if (value := values.pop(key, None)) is not None:
            name = key if key == "fsdp_version" else key.removeprefix("fsdp_")
            kept.setdefault(name, 2 if (key, value) == ("fsdp_version", 1) else value)
            changes.append(Change(key, value, {f"fsdp_config.{name}": kept[name]}, "it belongs to the section"))
    if words:
        asked = {name: value for word in words for name, value in FSDP_WORDS[word].items()}
        kept = {**asked, **kept}
        becomes = {f"fsdp_config.{name}": value for name, value in asked.items()} or {"fsdp_config": "FSDP2"}
        changes.append(Change("fsdp", values.pop("fsdp"), becomes, "FSDP2 divides whole layers"))
    if kept or words or changes:
        values["fsdp_config"] = kept
    return changes


def _fsdp_section(section: Mapping[Any, Any]) -> tuple[Values, list[Change]]:
    """A section in FSDP2's names. Of two names of one thing the one that isn't ours stays, to be refused."""
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
    _own_plugins,
    _deepspeed,
    _fsdp,
)
"""Each changes a recipe in place, and says what it changed."""
