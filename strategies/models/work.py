"""Operations of a model's matrix products: what its FLOPs are counted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from strategies.vision.modules import has_tower

__all__ = ["ModelWork", "Tokens", "triangle", "work_of"]

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configs whose models run a part of their weights for each token."""


def triangle(length: Any) -> Any:
    """Return the keys that so many tokens see, each itself and those before."""
    return length * (length + 1) / 2


@dataclass(frozen=True)
class Tokens:
    """Tokens that a forward has to compute, without padding; numbers, or scalar tensors."""

    tokens: Any
    keys: Any
    """Sum over all tokens of the keys that each attends to."""
    scored: Any
    """Tokens whose log-probability is computed."""

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.tokens + other.tokens, self.keys + other.keys, self.scored + other.scored)


@dataclass(frozen=True)
class ModelWork:
    """Weights of a model's matrix products.

    A forward takes 2 operations per weight and token (multiply, add), the head's on scored tokens alone, and per layer 4 for
    each dimension of its heads and key that a token sees. A backward takes the same for the gradient of what a layer is given,
    once more for attention, and once more per trained weight for its gradient: 6 per weight and token where all are trained,
    4 where they are frozen below an adapter. What is computed again (gradient checkpointing) isn't counted.
    """

    weights: int
    """Without embeddings and head."""
    trained: int
    """Of these."""
    head: int
    head_is_trained: bool
    attention: int
    """Layers times heads times the size of a head."""

    def forward(self, of: Tokens) -> Any:
        """Return the operations of a forward."""
        return 2 * self.weights * of.tokens + 2 * self.head * of.scored + 4 * self.attention * of.keys

    def training(self, of: Tokens) -> Any:
        """Return the operations of a forward and a backward."""
        trained = 2 * self.trained * of.tokens + 2 * self.head * self.head_is_trained * of.scored
        return 2 * self.forward(of) + trained + 4 * self.attention * of.keys


def work_of(model: Any) -> ModelWork | None:
    """Count the weights of a model; None for one with experts or with a tower for pictures, whose work depends on the rows."""
    config = model.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if any(getattr(config, name, None) for name in EXPERTS) or has_tower(model) or not heads or not layers:
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    products = [module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head]
    sizes = [_size(module) for module in products]
    trained = sum(number for module, number in zip(products, sizes, strict=True) if module.weight.requires_grad)
    return ModelWork(sum(sizes), trained, _size(head), head.weight.requires_grad, layers * heads * size)


def _size(module: Any) -> int:
    # Not the tensor's: ZeRO-3 leaves none on a worker, and quantized ones hold several weights in a byte.
    if isinstance(module, Conv1D):
        return module.nx * module.nf
    return module.in_features * module.out_features
