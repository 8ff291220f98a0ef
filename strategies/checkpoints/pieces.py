"""Pieces: contiguous ranges of flattened tensors, which is what every way of sharding leaves on a rank.

FSDP2 cuts a tensor along its first dimension, DeepSpeed cuts flattened ones; both leave ranges. So pieces that any number
of ranks wrote can be read by any other number.
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

__all__ = ["Piece", "PieceReader", "state_name", "write_pieces"]


@dataclass(frozen=True)
class Piece:
    """Values of a tensor from `start` on, in the order of its flattened elements."""

    name: str
    values: Tensor
    """Shape (numel,)."""
    start: int
    shape: tuple[int, ...]
    """Of the whole tensor."""


def state_name(rank: int, world_size: int) -> str:
    """File name of the pieces of a rank."""
    return f"state-{rank:05d}-of-{world_size:05d}.safetensors"


def write_pieces(folder: Path, rank: int, world_size: int, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write this rank's pieces; returns what its manifest says of them."""
    kept = {piece.name: piece for piece in pieces}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: piece.values.detach().cpu().contiguous() for name, piece in kept.items()}, folder / state_name(rank, world_size)
    )
    return {name: [piece.start, list(piece.shape)] for name, piece in kept.items()}


class PieceReader:
    """Reads ranges of tensors from the pieces of all ranks; a context manager, for it keeps their files open."""

    def __init__(self, folder: Path, manifests: Iterable[Mapping[str, Any]]) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._places: dict[str, list[tuple[int, str]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for manifest in manifests:
            file = state_name(manifest["rank"], manifest["world_size"])
            for name, (start, shape) in manifest["pieces"].items():
                self._places.setdefault(name, []).append((start, file))
                self._shapes[name] = tuple(shape)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def names(self, prefix: str) -> Iterator[str]:
        """Names of whole tensors that begin with `prefix`."""
        return (name for name in self._places if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a whole tensor; None where the checkpoint has none of this name."""
        return self._shapes.get(name)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements `start` to `start + numel` of a flattened tensor, to its end when `numel` is None.

        Raises:
            ValueError: where the pieces don't cover the range.
        """
        if name not in self._places:
            raise ValueError(f"{self._folder.name} has no {name}")
        stop = math.prod(self._shapes[name]) if numel is None else start + numel
        parts, reached = [], start
        for begin, file in sorted(self._places[name]):
            piece = self._file(file).get_slice(name)
            end = begin + piece.get_shape()[0]
            if begin <= reached < min(end, stop):
                parts.append(piece[reached - begin : min(end, stop) - begin])
                reached = min(end, stop)
        if reached < stop:
            raise ValueError(f"{self._folder.name} has no elements {reached} to {stop} of {name}")
        return torch.cat(parts) if parts else self._empty(name)

    def _empty(self, name: str) -> Tensor:
        _, file = self._places[name][0]
        return self._file(file).get_slice(name)[:0]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._files.enter_context(safe_open(self._folder / name, framework="pt"))
        return self._open[name]
