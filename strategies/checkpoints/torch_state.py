"""The state of torch's own optimizers and of FSDP2's weights, as pieces.

A plain tensor is whole on every rank: each stores its share of it. A sharded one (FSDP2's DTensor) is stored by the rank
that has the part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from strategies.checkpoints.pieces import Piece, PieceReader

__all__ = ["load_optimizer", "load_weights", "optimizer_groups", "optimizer_pieces", "weight_pieces"]

WEIGHTS = "weights/"
STATE = "optimizer."


def weight_pieces(names: Mapping[Tensor, str], rank: int, world_size: int) -> Iterator[Piece]:
    """Trained weights.

    Args:
        names: of the trained parameters.
    """
    for parameter, name in names.items():
        yield from _pieces(WEIGHTS + name, parameter, rank, world_size)


def load_weights(names: Mapping[Tensor, str], reader: PieceReader) -> None:
    """Put the stored weights into the parameters, each rank its part."""
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(_read_like(WEIGHTS + name, parameter, reader))


def optimizer_pieces(optimizer: Any, names: Mapping[Tensor, str], rank: int, world_size: int) -> Iterator[Piece]:
    """Tensors of the optimizer's state."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield from _pieces(f"{STATE}{key}/{names[parameter]}", value, rank, world_size)
            elif not isinstance(value, int | float | bool | None):
                raise ValueError(
                    f"optimizer: {type(getattr(optimizer, 'optimizer', optimizer)).__name__} keeps {key} as "
                    f"{type(value).__name__}, which a checkpoint can't hold; use another optimizer, or save_only_model: true"
                )


def optimizer_groups(optimizer: Any, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Parameter groups: names, options such as learning rates, and what the state holds beside tensors."""
    groups = []
    for group in optimizer.param_groups:
        numbers = {
            names[one]: _numbers(optimizer.state[one]) for one in group["params"] if _numbers(optimizer.state.get(one, {}))
        }
        options = {key: _plain(value) for key, value in group.items() if key != "params"}
        groups.append({"params": [names[one] for one in group["params"]], "options": options, "numbers": numbers})
    return groups


def load_optimizer(optimizer: Any, names: Mapping[Tensor, str], groups: list[dict[str, Any]], reader: PieceReader) -> None:
    """Give the optimizer the stored state.

    Raises:
        ValueError: where its parameters are grouped otherwise than those of the checkpoint.
    """
    mine = [[names[one] for one in group["params"]] for group in optimizer.param_groups]
    if mine != [group["params"] for group in groups]:
        raise ValueError("optimizer: the checkpoint's optimizer trains other parameters, or groups them otherwise")
    stored: dict[str, dict[str, str]] = {}
    for full_name in reader.names(STATE):
        key, _, name = full_name.removeprefix(STATE).partition("/")
        stored.setdefault(name, {})[key] = full_name
    state: dict[int, dict[str, Any]] = {}
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    numbers = {name: values for group in groups for name, values in group["numbers"].items()}
    for index, parameter in enumerate(parameters):
        name = names[parameter]
        tensors = {key: _read_like(full_name, parameter, reader) for key, full_name in stored.get(name, {}).items()}
        if found := {**tensors, **numbers.get(name, {})}:
            state[index] = found
    described = optimizer.state_dict()["param_groups"]
    options = [{**was, **_as_was(group["options"], was)} for was, group in zip(described, groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": options})


def _pieces(name: str, tensor: Tensor, rank: int, world_size: int) -> Iterator[Piece]:
    """This rank's piece of a tensor, if it has one."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor) and not all(isinstance(one, Replicate) for one in tensor.placements):
        if not isinstance(tensor.placements[0], Shard) or tensor.placements[0].dim != 0 or len(tensor.placements) > 1:
            raise ValueError(
                f"{name}: checkpoints know tensors that are sharded along their first dimension, not {tensor.placements}"
            )
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        values, start = tensor.to_local().flatten(), offset[0] * math.prod(shape[1:])
    else:
        flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten()
        start, stop = (flat.numel() * part // world_size for part in (rank, rank + 1))
        values = flat[start:stop]
    if values.numel():
        yield Piece(name, values, start, shape)


def _read_like(name: str, parameter: Tensor, reader: PieceReader) -> Tensor:
    """A stored tensor; the part that this rank has of it where the parameter is sharded and the tensor of its shape."""
    shape = reader.shape(name)
    if shape is None:
        raise ValueError(f"the checkpoint has no {name}")
    if not isinstance(parameter, DTensor) or shape != tuple(parameter.shape):
        return reader.read(name).reshape(shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    local_shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    row = math.prod(shape[1:])
    values = reader.read(name, offset[0] * row if math.prod(local_shape) else 0, math.prod(local_shape)).reshape(local_shape)
    values = values.to(parameter.device)
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _numbers(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _plain(value: Any) -> Any:
    """An option as JSON holds it."""
    return value.item() if isinstance(value, Tensor) else value


def _as_was(options: Mapping[str, Any], was: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the types that the optimizer gave them: JSON knows no tuples and no tensors."""
    return {key: _like(value, was.get(key)) for key, value in options.items()}


def _like(value: Any, example: Any) -> Any:
    if isinstance(example, tuple):
        return tuple(value)
    return torch.full_like(example, value) if isinstance(example, Tensor) else value
