"""The state of DeepSpeed's ZeRO, stages 1 to 3, as shards: float32 weights and the optimizer's moments.

In stages 1 and 2 a rank has a range of all parameters concatenated, in stage 3 a range of each; either way it has a range of a
flattened parameter. DeepSpeed's own checkpoints are pickles, and those of stage 3 can't be read by another number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from strategies.checkpoints.shards import Shard, ShardReader
from strategies.checkpoints.torch_state import STATE, WEIGHTS
from strategies.compat import mark_states_linked, state_fragment

__all__ = ["load_zero", "load_zero_weights", "zero_scalars", "zero_shards"]


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter: of its float32 weights (state None) and of the optimizer's states."""

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    get: Callable[[str | None], Tensor]
    put: Callable[[str | None, Tensor], None]

    def key(self, state: str | None) -> str:
        return (WEIGHTS if state is None else f"{STATE}{state}/") + self.name


def zero_shards(engine: Any) -> Iterator[Shard]:
    """Yield this rank's shards."""
    _link_states(engine.optimizer)
    keys = _state_keys(engine.optimizer)
    for part in _parts(engine):
        for state in (None, *keys):
            # Stage 3 pads the last partition of a parameter.
            values = part.get(state).detach().flatten()[: part.numel]
            yield Shard(part.key(state), values, part.start, part.shape)


def zero_scalars(engine: Any) -> dict[str, Any]:
    """Return the optimizer's scalars and options, which are the same on every rank."""
    optimizer = engine.optimizer
    states = (optimizer.optimizer.state.get(flat) for flat in _flats(optimizer))
    # All flat tensors step together, so that the scalars of one are those of all.
    state: dict[str, Any] = next(filter(None, states), {})
    scalars = {key: value for key, value in state.items() if not isinstance(value, Tensor) or value.numel() == 1}
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    scaler = {key: value for key, value in vars(optimizer.loss_scaler).items() if isinstance(value, int | float)}
    return {
        "state": {key: float(value) for key, value in scalars.items()},
        # DeepSpeed's Adam counts steps in an int, torch's in a tensor of float32; each needs its own type again.
        "whole": [key for key, value in scalars.items() if isinstance(value, int)],
        "groups": [
            {key: value for key, value in group.items() if isinstance(value, int | float | list | tuple)} for group in options
        ],
        "scaler": scaler,
    }


def load_zero(engine: Any, scalars: dict[str, Any], reader: ShardReader) -> None:
    """Load the stored weights and optimizer state into the engine."""
    optimizer = engine.optimizer
    keys = sorted({name.removeprefix(STATE).partition("/")[0] for name in reader.names(STATE)})
    # Before the parts, which are copied into them: a new optimizer has no state until its first step.
    _create_states(optimizer, keys, scalars)
    for group, saved in zip(optimizer.param_groups, scalars["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in saved.items()})
    vars(optimizer.loss_scaler).update(scalars["scaler"])
    _load_parts(engine, (None, *keys), reader)


def load_zero_weights(engine: Any, reader: ShardReader) -> None:
    """Load only the stored weights into the engine."""
    _load_parts(engine, (None,), reader)


def _load_parts(engine: Any, states: tuple[str | None, ...], reader: ShardReader) -> None:
    if _is_stage3(engine.optimizer):
        engine.empty_partition_cache()  # a forward without a backward leaves some weights gathered, with the old values
    with torch.no_grad():
        for part in _parts(engine):
            for state in states:
                part.put(state, reader.read(part.key(state), part.start, part.numel))
        _refresh_weights(engine)


def _parts(engine: Any) -> Iterator[Part]:
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = _part_of_each(name, parameter) if _is_stage3(engine.optimizer) else _part_of_all(name, parameter)
        if part is not None:
            yield part


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _part_of_all(name: str, parameter: Any) -> Part | None:
    """Return the part in stages 1 and 2: the overlap of the parameter with this rank's range of all parameters."""
    mapping = state_fragment(parameter)
    if mapping is None:
        return None
    # `lp` is the parameter, `hp` its float32 copy in the flat buffer; this address is a range of the flattened parameter.
    address = mapping.lp_fragment_address

    def put(state: str | None, values: Tensor) -> None:
        mapping.get_hp_fragment(state).data.copy_(values)

    return Part(name, address.start, address.numel, tuple(parameter.shape), mapping.get_hp_fragment, put)


def _part_of_each(name: str, parameter: Any) -> Part | None:
    """Return the part in stage 3: this rank's range of the parameter; the last one may be shorter."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    # Of a partition: the parameter's size divided by the ranks, rounded up.
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    numel = min(size, parameter.ds_numel - start)
    if numel <= 0:
        return None

    def get(state: str | None) -> Tensor:
        return safe_get_local_fp32_param(parameter) if state is None else safe_get_local_optimizer_state(parameter, state)

    def put(state: str | None, values: Tensor) -> None:
        padded = pad(values, (0, parameter.ds_tensor.numel() - numel))
        if state is None:
            safe_set_local_fp32_param(parameter, padded)
            # The partition that forwards gather; the function above sets only the optimizer's copy.
            parameter.ds_tensor.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, state)

    return Part(name, start, numel, tuple(parameter.ds_shape), get, put)


def _flats(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 tensors that DeepSpeed's inner optimizer steps."""
    return list(optimizer.fp32_partitioned_groups_flat if _is_stage3(optimizer) else optimizer.single_partition_of_fp32_groups)


def _state_keys(optimizer: Any) -> list[str]:
    keys = {
        key
        for flat in _flats(optimizer)
        for key, value in optimizer.optimizer.state.get(flat, {}).items()
        if isinstance(value, Tensor) and value.shape == flat.shape
    }
    return sorted(keys)


def _create_states(optimizer: Any, keys: list[str], scalars: dict[str, Any]) -> None:
    """Create the states that the first step would create, to copy into."""
    for flat in _flats(optimizer):
        state = {key: torch.zeros_like(flat.data) for key in keys}
        for key, value in scalars["state"].items():
            state[key] = int(value) if key in scalars["whole"] else torch.tensor(value, dtype=torch.float32)
        optimizer.optimizer.state[flat] = state
    _link_states(optimizer)


def _link_states(optimizer: Any) -> None:
    """Link the parameters of stages 1 and 2 to their part of the states.

    DeepSpeed 0.19.8 does so once, when the first of its groups has stepped, and never for the other groups.
    """
    if _is_stage3(optimizer):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)
    mark_states_linked(optimizer)


def _refresh_weights(engine: Any) -> None:
    """Update the weights that the forward pass reads: bfloat16 copies, and persistent ones that stage 3 does not partition."""
    optimizer = engine.optimizer
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
    elif optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
