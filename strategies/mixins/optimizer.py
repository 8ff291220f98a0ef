"""Learning rates per part of the model, and optimizers passed as a class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

__all__ = ["GroupRates", "OptimizerInitMixin", "OptimizerMixin", "parameter_groups"]


@dataclass(frozen=True)
class GroupRates:
    """Learning rates by part of the model. The first field that matches a parameter applies.

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
        """Whether any parameter has another learning rate than `base`."""
        return bool(self.named) or self.embedding is not None or self.loraplus_ratio is not None


def parameter_groups(model: nn.Module, decay_names: set[str], rates: GroupRates) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` for an optimizer: dicts of name, params, lr, weight_decay.

    Args:
        decay_names: names of the parameters that may decay; embeddings never do.

    Raises:
        ValueError: if a substring of `lr_groups` matches no trainable parameter, or no embedding is trained.
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
            # 1e-6 is the default of PEFT's `create_loraplus_optimizer` too.
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
    """Return the names of input embeddings, the output head, and adapters of either."""
    heads = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    # By identity: a tied head has the embedding's parameter, under one name in `trainable`.
    owned = {id(param) for module in [*heads, *([output] if output is not None else [])] for param in module.parameters()}
    # PEFT keeps adapters of embeddings, and tokens trained singly, outside of the `nn.Embedding`.
    marks = ("lora_embedding_", "trainable_tokens_delta")
    return {name for name, param in trainable.items() if id(param) in owned or any(mark in name for mark in marks)}


class OptimizerMixin(Trainer):
    """Builds the optimizer over parameter groups when the config gives any part of the model its own learning rate."""

    optimizer: Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the optimizer once; without learning rates per part it is transformers' own.

        Raises:
            ValueError: if a learning rate names parts that the model doesn't have or doesn't train.
        """
        rates = self._group_rates()
        if self.optimizer is None and rates.are_special:
            opt_model = model if model is not None else self.model
            groups = parameter_groups(opt_model, set(self.get_decay_parameter_names(opt_model)), rates)
            custom = self.optimizer_cls_and_kwargs
            cls, kwargs = custom if custom is not None else self.get_optimizer_cls_and_kwargs(self.args, opt_model)
            # By these arguments transformers gives GaLore, LOMO and layer-wise optimizers parameters of its own choice.
            if {"params", "model", "optimizer_dict"} & set(kwargs):
                raise ValueError(
                    f"optimizer: {self.args.optim} groups the parameters itself; "
                    "remove lr_groups, embedding_lr, embedding_lr_scale and loraplus_lr_ratio"
                )
            self.optimizer = cls(groups, **kwargs)
        return super().create_optimizer(model)

    def _group_rates(self) -> GroupRates:
        args = self.args
        embedding = args.embedding_lr
        if args.embedding_lr_scale is not None:
            embedding = args.learning_rate * args.embedding_lr_scale
        return GroupRates(
            base=args.learning_rate,
            weight_decay=args.weight_decay,
            named=[(group["name"], tuple(group["modules"]), group["lr"]) for group in args.lr_groups or []],
            embedding=embedding,
            loraplus_ratio=args.loraplus_lr_ratio,
            loraplus_embedding=args.loraplus_lr_embedding,
        )


class OptimizerInitMixin(Trainer):
    """Accepts `optimizer_cls_and_kwargs`, which TRL's constructors don't pass on to transformers' trainer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        custom = kwargs.pop("optimizer_cls_and_kwargs", None)
        super().__init__(*args, **kwargs)
        if custom is not None:
            self.optimizer_cls_and_kwargs = custom
