"""The state of torch's own optimizers and of FSDP2's weights, as shards.

Of a plain tensor, which is replicated on every rank, each rank stores an equal part. Of a sharded one (FSDP2's DTensor), each
rank stores its local part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from strategies.checkpoints.shards import Shard, ShardReader
from strategies.compat import local_part

__all__ = ["load_optimizer", "load_weights", "optimizer_groups", "optimizer_shards", "weight_shards"]

WEIGHTS = "weights/"
# `optimizer.KEY/NAME`: keys of states have no slash, so that the first one ends the key.
STATE = "optimizer."


def weight_shards(names: Mapping[Tensor, str], rank: int, world_size: int) -> Iterator[Shard]:
    """Yield this rank's shards of the trained weights.

    Args:
        names: of the trained parameters.
    """
    for parameter, name in names.items():
        yield from _shards(WEIGHTS + name, parameter, rank, world_size)


def load_weights(names: Mapping[Tensor, str], reader: ShardReader) -> None:
    """Copy the stored weights into the parameters, on each rank its part."""
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(_read_like(WEIGHTS + name, parameter, reader))


def optimizer_shards(optimizer: Any, names: Mapping[Tensor, str], rank: int, world_size: int) -> Iterator[Shard]:
    """Yield this rank's shards of the optimizer's state tensors.

    Raises:
        ValueError: for state that is neither a tensor nor a scalar.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield from _shards(f"{STATE}{key}/{names[parameter]}", value, rank, world_size)
            elif not isinstance(value, int | float | bool | None):
                raise ValueError(
                    f"optimizer: {type(getattr(optimizer, 'optimizer', optimizer)).__name__} keeps {key} as "
                    f"{type(value).__name__}, which a checkpoint can't hold; use another optimizer, or save_only_model: true"
                )


def optimizer_groups(optimizer: Any, names: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Return the parameter groups: names, options such as learning rates, and the state's scalars."""
    groups = []
    for group in optimizer.param_groups:
        parameters = {names[parameter]: parameter for parameter in group["params"]}
        scalars = {name: _scalars(optimizer.state.get(parameter, {})) for name, parameter in parameters.items()}
        scalars = {name: values for name, values in scalars.items() if values}
        # torch's optimizers also take a learning rate as a tensor, which JSON doesn't.
        options = {key: _to_json(value) for key, value in group.items() if key != "params"}
        groups.append({"params": list(parameters), "options": options, "numbers": scalars})
    return groups


def load_optimizer(optimizer: Any, names: Mapping[Tensor, str], groups: list[dict[str, Any]], reader: ShardReader) -> None:
    """Load the stored state into the optimizer.

    Raises:
        ValueError: if its parameter groups differ from the checkpoint's.
    """
    # torch's `load_state_dict` assigns states by number alone: a parameter would silently get the moments of another one.
    current = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if current != [group["params"] for group in groups]:
        raise ValueError("optimizer: the checkpoint's optimizer trains other parameters, or groups them otherwise")
    stored: dict[str, dict[str, str]] = {}
    for full_name in reader.names(STATE):
        key, _, name = full_name.removeprefix(STATE).partition("/")
        stored.setdefault(name, {})[key] = full_name
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scalars = {name: values for group in groups for name, values in group["numbers"].items()}
    # Numbered over all groups, as torch's `state_dict` does.
    for index, parameter in enumerate(parameters):
        name = names[parameter]
        tensors = {key: _read_like(full_name, parameter, reader) for key, full_name in stored.get(name, {}).items()}
        if values := {**tensors, **scalars.get(name, {})}:
            state[index] = values
    current_groups = optimizer.state_dict()["param_groups"]
    # Over the current options: a checkpoint of an older torch lacks those that were added since.
    options = [{**old, **_from_json(group["options"], old)} for old, group in zip(current_groups, groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": options})


def _shards(name: str, tensor: Tensor, rank: int, world_size: int) -> Iterator[Shard]:
    """Yield this rank's shard of a tensor, if it has one."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor) and not all(isinstance(placement, Replicate) for placement in tensor.placements):
        # Only a part of dimension 0 is a contiguous range, and only on a mesh of one dimension does each rank have its own.
        if not isinstance(tensor.placements[0], ShardPlacement) or tensor.placements[0].dim != 0 or len(tensor.placements) > 1:
            raise ValueError(
                f"{name}: checkpoints know tensors that are sharded along their first dimension, not {tensor.placements}"
            )
        _, offset = local_part(tensor)
        values, start = tensor.to_local().flatten(), offset[0] * math.prod(shape[1:])
    else:
        flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).flatten()
        start, stop = (flat.numel() * part // world_size for part in (rank, rank + 1))
        values = flat[start:stop]
    if values.numel():
        yield Shard(name, values, start, shape)


def _read_like(name: str, parameter: Tensor, reader: ShardReader) -> Tensor:
    """Read a tensor; only this rank's part if the parameter is sharded and the tensor has its shape."""
    shape = reader.shape(name)
    if shape is None:
        raise ValueError(f"the checkpoint has no {name}")
    # State of another shape, such as Adam's step, is whole on every rank, also where the parameter is sharded.
    if not isinstance(parameter, DTensor) or shape != tuple(parameter.shape):
        return reader.read(name).reshape(shape)
    mesh, placements = parameter.device_mesh, parameter.placements
    local_shape, offset = local_part(parameter)
    row = math.prod(shape[1:])
    values = reader.read(name, offset[0] * row if math.prod(local_shape) else 0, math.prod(local_shape)).reshape(local_shape)
    values = values.to(parameter.device)
    # Shape and stride are given: `from_local` would compute them as if all parts were as large as this one.
    return DTensor.from_local(values, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _to_json(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _from_json(options: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to the types of the current ones: JSON has no tuples and no tensors."""
    return {key: _like(value, current.get(key)) for key, value in options.items()}


def _like(value: Any, example: Any) -> Any:
    if isinstance(example, tuple):
        return tuple(value)
    return torch.full_like(example, value) if isinstance(example, Tensor) else value
