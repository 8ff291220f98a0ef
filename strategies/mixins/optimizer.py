"""Learning rates of their own for parts of the model, and optimizers that come as a class."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from strategies.parameter_groups import GroupRates, parameter_groups

__all__ = ["OptimizerInitMixin", "OptimizerMixin"]


class OptimizerMixin(Trainer):
    """Builds the optimizer over parameter groups when the config gives any part of the model its own learning rate."""

    optimizer: Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the optimizer once; without own learning rates it is transformers' own.

        Raises:
            ValueError: when a learning rate names parts that the model doesn't have or doesn't train.
        """
        rates = self._group_rates()
        if self.optimizer is None and rates.are_special:
            opt_model = model if model is not None else self.model
            groups = parameter_groups(opt_model, set(self.get_decay_parameter_names(opt_model)), rates)
            given = self.optimizer_cls_and_kwargs
            cls, kwargs = given if given is not None else self.get_optimizer_cls_and_kwargs(self.args, opt_model)
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
    """Takes `optimizer_cls_and_kwargs`, which transformers' trainer knows and TRL's constructors don't pass on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.pop("optimizer_cls_and_kwargs", None)
        super().__init__(*args, **kwargs)
        if given is not None:
            self.optimizer_cls_and_kwargs = given
