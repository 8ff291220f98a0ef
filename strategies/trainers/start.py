"""Check at the first step that policy and reference give the same log-probabilities, unless the reference is another model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.packing.support import is_exact

__all__ = ["check_start"]

TOLERANCE = {True: 2e-3, False: 5e-2}
"""Nats per token, relative to the reference's if those exceed 1, by whether products are exact to float32. bfloat16 is off by
up to 2e-2 where the reference was scored in other rows."""


def check_start(trainer: Any, policy: Tensor, reference: Tensor, mask: Tensor) -> None:
    """Check that the policy is the reference that it claims to start from. Every rank must call it.

    Args:
        policy: log-probabilities of tokens, computed without dropout; any shape.
        reference: the same tokens' under the reference, same shape.
        mask: 1 for tokens to compare, same shape.

    Raises:
        ValueError: on all ranks.
    """
    parts = [(policy - reference).abs(), reference.abs(), torch.ones_like(policy)]
    sums = torch.stack([(part.float() * mask).sum() for part in parts])
    apart, size, tokens = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    exact = not (trainer.args.bf16 or trainer.args.fp16) and is_exact(trainer.accelerator.unwrap_model(trainer.model))
    if apart > TOLERANCE[exact] * max(size, tokens):  # false for nan: the step guard reports non-finite values
        raise ValueError(
            f"reference: at its first step the policy isn't its reference: they differ by {apart / tokens:.3g} nats a token "
            f"where the reference gives {size / tokens:.3g}; an adapter that changes the base model's own weights has no "
            "reference there, and a reference that is another model must be named (reference_model)"
        )
