"""Shards of bounded size, with the index by which `from_pretrained` finds a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from strategies.merging.plan import MergePlan

__all__ = ["write_shards"]

PATTERN, INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"


def write_shards(plan: MergePlan, folder: Path, shard_size: int, progress: Callable[[int, int], None]) -> list[Path]:
    """Write the merged model's tensors, shard by shard; returns the shards.

    In memory are the adapter, the tensors of one shard, and what merging one module takes (three float32 copies of its matrix).

    Args:
        shard_size: bytes of a shard at most; a tensor that is larger has one of its own.
        progress: called with the number of tensors done, and of all.

    Raises:
        ValueError: when a sum isn't finite.
        OSError: when the disk fails, or is full.
    """
    outputs = {output.name: output for output in plan.outputs}
    split = split_state_dict_into_shards_factory(
        outputs, get_storage_size=lambda output: output.nbytes, filename_pattern=PATTERN, max_shard_size=shard_size
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors[name] = plan.tensor(outputs[name])
            done += 1
            progress(done, len(outputs))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / file for file in split.filename_to_tensors]
