"""The parts of a model that encode pictures: its tower, and what maps the tower's states to the text model's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import PeftModel

__all__ = ["freeze_tower", "has_tower", "inner_model", "outside_tower", "tower"]


def inner_model(model: Any) -> Any:
    """Return the model below the output head, without wrappers (DDP, DeepSpeed, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def has_tower(model: Any) -> bool:
    """Return whether the model encodes pictures."""
    return hasattr(inner_model(model), "get_image_features")


def tower(model: Any) -> dict[str, Any]:
    """Return the modules beside the text model, by name; none where the model encodes no pictures."""
    if not has_tower(model):
        return {}
    inner = inner_model(model)
    text = inner.get_decoder()
    # Not the tower alone: what maps its states to the text model's is another module.
    return {name: module for name, module in inner.named_children() if module is not text}


def freeze_tower(model: Any) -> None:
    """Leave the weights that encode pictures as they are."""
    for module in tower(model).values():
        module.requires_grad_(False)


def outside_tower(model: Any, targets: str | Sequence[str]) -> str | None:
    """Return a regular expression of the modules that an adapter leaves out: those of the tower, unless `targets` name one.

    Raises:
        ValueError: for a target that only modules of the tower match.
    """
    names = list(tower(model))
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not names or any(name in pattern for name in names for pattern in patterns):
        return None
    # A pattern, which PEFT matches in full: names in a list match only the ends of modules' names.
    outside = rf"(.*\.)?({'|'.join(names)})(\..*)?"
    for pattern in () if targets == "all-linear" else patterns:
        # As PEFT matches them.
        regex = pattern if isinstance(targets, str) else rf"(.*\.)?{re.escape(pattern)}"
        found = [name for name, _ in model.named_modules() if re.fullmatch(regex, name)]
        if found and all(re.fullmatch(outside, name) for name in found):
            raise ValueError(
                f"lora_target_modules: only modules that encode pictures match {pattern!r}, such as {found[0]}, and they get "
                f"an adapter only where a target names their part ({', '.join(names)}); write a regular expression that does, "
                f"or remove {pattern!r}"
            )
    return outside
