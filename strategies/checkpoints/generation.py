"""The generation batch of grpo in a checkpoint that is saved between two of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["read_generation", "write_generation"]

Batches = list[dict[str, Any]]
"""One per step of a generation batch: name -> tensor whose first dimension is the step's completions."""


def write_generation(folder: Path, rank: int, world_size: int, batches: Sequence[dict[str, Any]]) -> None:
    """Write this rank's batches of completions; nothing if they contain anything but tensors."""
    values = [(f"{index}/{name}", value) for index, batch in enumerate(batches) for name, value in batch.items()]
    # Other values, such as pictures, would need a pickle; a run resumed without the file generates the batch again.
    if all(value is None or isinstance(value, torch.Tensor) for _, value in values):
        # Cloned: TRL's `split_tensor_dict` puts one scalar tensor into all batches, and safetensors refuses to write it twice.
        tensors = {name: value.cpu().contiguous().clone() for name, value in values if value is not None}
        save_file(tensors, folder / _name(rank, world_size))


def read_generation(folder: Path, rank: int, world_size: int, device: torch.device) -> Batches | None:
    """Return what this rank wrote; None if it wrote nothing, or the number of workers differs."""
    file = folder / _name(rank, world_size)
    if not file.is_file():
        return None
    batches: dict[int, dict[str, Any]] = {}
    for name, value in load_file(file, device=str(device)).items():
        index, _, key = name.partition("/")
        batches.setdefault(int(index), {})[key] = value
    # safetensors lists names as text, where 10 comes before 2.
    return [batches[index] for index in sorted(batches)]


def _name(rank: int, world_size: int) -> str:
    return f"generation-{rank:05d}-of-{world_size:05d}.safetensors"
