"""Shards: contiguous ranges of flattened tensors.

FSDP2 splits a tensor along its first dimension, DeepSpeed splits flattened ones; either way a rank has a contiguous range. So
shards written by any number of ranks can be read by any other number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Shard", "ShardReader", "state_name", "write_shards"]


@dataclass(frozen=True)
class Shard:
    """Elements of a flattened tensor, from index `start`."""

    name: str
    values: Tensor
    """Shape (numel,)."""
    start: int
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


def state_name(rank: int, world_size: int) -> str:
    """Return the file name of a rank's shards."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def write_shards(folder: Path, rank: int, world_size: int, shards: Iterable[Shard]) -> dict[str, Any]:
    """Write this rank's shards; return their entry in its manifest."""
    by_name = {shard.name: shard for shard in shards}
    # On a CPU the parts are views of parameters, or of ZeRO's flat buffer; safetensors takes views that don't overlap.
    tensors = {name: shard.values.detach().cpu().contiguous() for name, shard in by_name.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / state_name(rank, world_size))
    return {name: [shard.start, list(shard.shape)] for name, shard in by_name.items()}


class ShardReader:
    """Reads ranges of tensors from the shards of all ranks; a context manager, since it keeps their files open."""

    def __init__(self, folder: Path, manifests: Iterable[Mapping[str, Any]]) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._shards: dict[str, list[tuple[int, str]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for manifest in manifests:
            file = state_name(manifest["rank"], manifest["world_size"])
            for name, (start, shape) in manifest["pieces"].items():
                self._shards.setdefault(name, []).append((start, file))
                self._shapes[name] = tuple(shape)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def names(self, prefix: str) -> Iterator[str]:
        """Return the names of tensors that begin with `prefix`."""
        return (name for name in self._shards if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a whole tensor; None if the checkpoint has none of this name."""
        return self._shapes.get(name)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Return elements `start` to `start + numel` of a flattened tensor, to its end when `numel` is None.

        Raises:
            ValueError: if the shards don't cover the range.
        """
        if name not in self._shards:
            raise ValueError(f"{self._folder.name} has no {name}")
        stop = math.prod(self._shapes[name]) if numel is None else start + numel
        parts, reached = [], start
        for begin, file in sorted(self._shards[name]):
            shard = self._file(file).get_slice(name)
            end = begin + shard.get_shape()[0]
            # In the order of their starts; one that begins beyond `reached` leaves a gap, which is reported below.
            if begin <= reached < min(end, stop):
                parts.append(shard[reached - begin : min(end, stop) - begin])
                reached = min(end, stop)
        if reached < stop:
            raise ValueError(f"{self._folder.name} has no elements {reached} to {stop} of {name}")
        return torch.cat(parts) if parts else self._empty(name)

    def _empty(self, name: str) -> Tensor:
        # From a file, for the dtype: a rank may have no part of a tensor that others have.
        _, file = self._shards[name][0]
        return self._file(file).get_slice(name)[:0]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._files.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._open[name]
