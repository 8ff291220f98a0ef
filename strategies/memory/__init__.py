"""How much memory one training worker will need, computed without loading weights.

shadow.py      the models of a config, as shapes
step.py        the most that one forward and backward pass of the worst case hold
optimizers.py  what each optimizer keeps per trainable weight
measure.py     the same worst case trained for two steps in a fresh process, and what that took
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

__all__ = ["ITEMS", "Forward", "MemoryEstimate", "estimate"]

PROCESS = 560 * 2**20
"""Bytes of a CPU worker that trains a model of no size: Python, torch, transformers, TRL, PEFT and Ray.

Measured on Linux: 505 MiB for a tiny model trained without Ray, and 55 for `ray.train` and `ray.data`.
"""
GPU_PROCESS = 600 * 2**20
"""Bytes of GPU memory that a process takes before its first tensor (CUDA's context and libraries). Usual; unmeasured."""


@dataclass(frozen=True)
class Forward:
    """The largest forward of a run."""

    packed: bool
    tokens: int
    """That the model computes, padding among them."""
    pairs: int
    """Pairs, or labelled rows, in it."""
    padded_because: str | None = None
    """Why batches are padded although packed rows were asked for."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at its peak: on a CPU of the process, on a GPU of that."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    """Without the token head's: what the layers hold at the moment when most is held."""
    token_head: int
    """Tensors of the vocabulary's size at that moment: logits held at once, their statistics, the head's gradient."""
    buckets: int
    """DDP's copy of the gradients."""
    process: int
    forward: Forward
    notes: tuple[str, ...] = ()
    """What could not be computed, and what was done instead."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items().values())

    def items(self) -> dict[str, int]:
        """Bytes by field."""
        return {name: getattr(self, name) for name in ITEMS}


ITEMS = tuple(field.name for field in fields(MemoryEstimate) if field.name not in ("forward", "notes"))
"""Fields of `MemoryEstimate` that add up."""


def estimate(cfg: Any, world_size: int = 1, gpu: bool = False) -> MemoryEstimate:
    """Predict the peak memory of one worker that trains under DDP.

    The worst case that the config allows: a forward full of the longest sequences, while gradients of an earlier forward
    of the same step are held. What an optimizer's update needs on top is left out, for activations are gone by then; so is
    loading, which holds the weights up to three times, and what a C library keeps of freed tensors for later: under glibc's
    defaults a process on a CPU holds up to twice what is in use; with MALLOC_TRIM_THRESHOLD_ set, hardly more.

    Args:
        cfg: a validated config, or a dict of the same keys.
        world_size: number of workers.
        gpu: whether workers have a GPU; its attention and kernels are taken to hold what the CPU's do, or less.

    Raises:
        ValueError: when there is no model, or no usable config of one, at the given place.
    """
    from strategies.config import as_config
    from strategies.memory.optimizers import state_bytes
    from strategies.memory.shadow import Shadow
    from strategies.memory.step import hold, largest_forward

    cfg = as_config(cfg)
    shadow = Shadow(cfg, gpu)
    forward = largest_forward(cfg, shadow)
    held = hold(cfg, shadow, forward)
    trainable = shadow.trainable()
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    states, note = state_bytes(cfg.optimizer, trainable)
    return MemoryEstimate(
        weights=shadow.weight_bytes(),
        gradients=gradients,
        optimizer=sum(states),
        reference=shadow.reference_bytes(),
        activations=held.activations,
        token_head=held.token_head,
        buckets=gradients if world_size > 1 else 0,
        process=GPU_PROCESS if gpu else PROCESS,
        forward=forward,
        notes=tuple(one for one in (*shadow.notes, held.note, note) if one is not None),
    )
