"""Which parameter trains at which learning rate, with or without weight decay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["GroupRates", "parameter_groups"]


@dataclass(frozen=True)
class GroupRates:
    """Learning rates by part of the model. The first that applies to a parameter counts, in the order of the fields.

    `loraplus_ratio` is LoRA+ (arXiv 2402.12354): B learns at `base * loraplus_ratio`, A at `base`, adapters of
    embeddings at `loraplus_embedding` (1e-6 when not given).
    """

    base: float
    weight_decay: float = 0.0
    named: list[tuple[str, tuple[str, ...], float]] = field(default_factory=list)
    embedding: float | None = None
    loraplus_ratio: float | None = None
    loraplus_embedding: float | None = None

    @property
    def are_special(self) -> bool:
        """Whether anything learns at another rate than `base`."""
        return bool(self.named) or self.embedding is not None or self.loraplus_ratio is not None


def parameter_groups(model: nn.Module, decay_names: set[str], rates: GroupRates) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for an optimizer: dicts of name, params, lr, weight_decay.

    Args:
        decay_names: names of the parameters that may decay; embeddings never do.

    Raises:
        ValueError: when a substring of `lr_groups` matches no trainable parameter, or there is no embedding to train.
    """
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    _check_matches(list(trainable), rates)
    embeddings = _embedding_names(model, trainable)
    if rates.embedding is not None and not embeddings:
        raise ValueError("embedding_lr: the model trains no embedding; remove the key, or train the embeddings too")
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, param in trainable.items():
        part, lr = _rate(name, name in embeddings, rates)
        decays = name in decay_names and name not in embeddings
        weight_decay = rates.weight_decay if decays else 0.0
        new = {"name": part + ("" if decays else "_no_decay"), "params": [], "lr": lr, "weight_decay": weight_decay}
        groups.setdefault((part, decays), new)["params"].append(param)
    return list(groups.values())


def _rate(name: str, is_embedding: bool, rates: GroupRates) -> tuple[str, float]:
    for group, modules, lr in rates.named:
        if any(module in name for module in modules):
            return group, lr
    if is_embedding and rates.embedding is not None:
        return "embeddings", rates.embedding
    if rates.loraplus_ratio is not None:
        if "lora_embedding_" in name:
            return "lora_embeddings", 1e-6 if rates.loraplus_embedding is None else rates.loraplus_embedding
        if "lora_B" in name:
            return "lora_B", rates.base * rates.loraplus_ratio
    return "base", rates.base


def _check_matches(names: list[str], rates: GroupRates) -> None:
    for index, (group, modules, _) in enumerate(rates.named):
        for module in modules:
            if not any(module in name for name in names):
                examples = ", ".join(names[:3])
                raise ValueError(
                    f"lr_groups.{index}.modules: {module!r} (group {group!r}) is part of no trainable parameter's "
                    f"name; names look like {examples}"
                )
    if rates.loraplus_ratio is not None and not any("lora_B" in name for name in names):
        raise ValueError("loraplus_lr_ratio: the model has no LoRA adapter to train; set `adapter: lora` or remove it")


def _embedding_names(model: nn.Module, trainable: dict[str, nn.Parameter]) -> set[str]:
    """Input embeddings, the output head, and adapters of either."""
    heads = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owned = {id(param) for module in [*heads, *([output] if output is not None else [])] for param in module.parameters()}
    marks = ("lora_embedding_", "trainable_tokens_delta")
    return {name for name, param in trainable.items() if id(param) in owned or any(mark in name for mark in marks)}
