"""The state of DeepSpeed's ZeRO, stages 1 to 3, as pieces: float32 weights and the optimizer's moments.

Stages 1 and 2 give a rank a range of all parameters laid end to end, stage 3 a range of each; either way the rank has a range
of a flattened parameter. DeepSpeed's own checkpoints are pickles, and those of stage 3 can't be read by another number of
workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from strategies.checkpoints.pieces import Piece, PieceReader
from strategies.checkpoints.torch_state import STATE, WEIGHTS

__all__ = ["load_zero", "load_zero_weights", "zero_numbers", "zero_pieces"]


@dataclass(frozen=True)
class Part:
    """What this rank has of a parameter: of its float32 weights (state None) and of the optimizer's states."""

    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    get: Callable[[str | None], Tensor]
    put: Callable[[str | None, Tensor], None]

    def key(self, state: str | None) -> str:
        return (WEIGHTS if state is None else f"{STATE}{state}/") + self.name


def zero_pieces(engine: Any) -> Iterator[Piece]:
    """This rank's pieces."""
    _link_states(engine.optimizer)
    keys = _state_keys(engine.optimizer)
    for part in _parts(engine):
        for state in (None, *keys):
            values = part.get(state).detach().flatten()[: part.numel]
            yield Piece(part.key(state), values, part.start, part.shape)


def zero_numbers(engine: Any) -> dict[str, Any]:
    """What the optimizer keeps beside tensors of the weights' size: the same on every rank."""
    optimizer = engine.optimizer
    state: dict[str, Any] = next((found for flat in _flats(optimizer) if (found := optimizer.optimizer.state.get(flat))), {})
    numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor) or value.numel() == 1}
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    scaler = {key: value for key, value in vars(optimizer.loss_scaler).items() if isinstance(value, int | float)}
    return {
        "state": {key: float(value) for key, value in numbers.items()},
        "whole": [key for key, value in numbers.items() if isinstance(value, int)],
        "groups": [
            {key: value for key, value in group.items() if isinstance(value, int | float | list | tuple)} for group in options
        ],
        "scaler": scaler,
    }


def load_zero(engine: Any, numbers: dict[str, Any], reader: PieceReader) -> None:
    """Give the engine the stored weights and optimizer."""
    optimizer = engine.optimizer
    keys = sorted({name.removeprefix(STATE).partition("/")[0] for name in reader.names(STATE)})
    _create_states(optimizer, keys, numbers)
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in saved.items()})
    vars(optimizer.loss_scaler).update(numbers["scaler"])
    _load_parts(engine, (None, *keys), reader)


def load_zero_weights(engine: Any, reader: PieceReader) -> None:
    """Give the engine the stored weights alone."""
    _load_parts(engine, (None,), reader)


def _load_parts(engine: Any, states: tuple[str | None, ...], reader: PieceReader) -> None:
    if _is_stage3(engine.optimizer):
        engine.empty_partition_cache()  # a forward pass without a backward one leaves some weights whole, as they were
    with torch.no_grad():
        for part in _parts(engine):
            for state in states:
                part.put(state, reader.read(part.key(state), part.start, part.numel))
        _refresh_weights(engine)


def _parts(engine: Any) -> Iterator[Part]:
    trained = [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]
    for name, parameter in trained:
        part = _part_of_each(name, parameter) if _is_stage3(engine.optimizer) else _part_of_all(name, parameter)
        if part is not None:
            yield part


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _part_of_all(name: str, parameter: Any) -> Part | None:
    """Stages 1 and 2: the overlap of the parameter with this rank's range of all."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.lp_fragment_address

    def put(state: str | None, values: Tensor) -> None:
        mapping.get_hp_fragment(state).data.copy_(values)

    return Part(name, address.start, address.numel, tuple(parameter.shape), mapping.get_hp_fragment, put)


def _part_of_each(name: str, parameter: Any) -> Part | None:
    """Stage 3: this rank's range of the parameter, of which the last may be short."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

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
            parameter.ds_tensor.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, state)

    return Part(name, start, numel, tuple(parameter.ds_shape), get, put)


def _flats(optimizer: Any) -> list[Tensor]:
    """The flat float32 tensors that DeepSpeed's inner optimizer steps."""
    return list(optimizer.fp32_partitioned_groups_flat if _is_stage3(optimizer) else optimizer.single_partition_of_fp32_groups)


def _state_keys(optimizer: Any) -> list[str]:
    found = {
        key
        for flat in _flats(optimizer)
        for key, value in optimizer.optimizer.state.get(flat, {}).items()
        if isinstance(value, Tensor) and value.shape == flat.shape
    }
    return sorted(found)


def _create_states(optimizer: Any, keys: list[str], numbers: dict[str, Any]) -> None:
    """Make the states that the first step would make, so that there is something to copy into."""
    for flat in _flats(optimizer):
        state = {key: torch.zeros_like(flat.data) for key in keys}
        for key, value in numbers["state"].items():
            state[key] = int(value) if key in numbers["whole"] else torch.tensor(value, dtype=torch.float32)
        optimizer.optimizer.state[flat] = state
    _link_states(optimizer)


def _link_states(optimizer: Any) -> None:
    """Let parameters of stages 1 and 2 know their part of the states.

    DeepSpeed 0.19.8 does it once, when the first of its groups has stepped, so that the others never know theirs.
    """
    if _is_stage3(optimizer):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, optimizer.optimizer.state)
    optimizer._hp_optimizer_states_linked = True


def _refresh_weights(engine: Any) -> None:
    """Let all ranks have the weights whole that the forward pass reads whole."""
    optimizer = engine.optimizer
    if not _is_stage3(optimizer):
        optimizer.update_lp_params()
    elif optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
