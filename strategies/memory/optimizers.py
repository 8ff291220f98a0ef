"""What optimizers keep between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["STATES", "state_bytes"]

Counted = Callable[[Any], int]
"""Of a parameter, the bytes of its state."""


def _like(number: int) -> Counted:
    """So many tensors of the parameter's own shape and dtype."""
    return lambda parameter: number * parameter.numel() * parameter.element_size()


def _float32(number: int) -> Counted:
    return lambda parameter: number * parameter.numel() * 4


def _blockwise(number: int) -> Counted:
    """So many tensors of one byte per weight and a float32 per block of 256; small ones stay in float32 (bitsandbytes)."""

    def counted(parameter: Any) -> int:
        size = parameter.numel()
        return number * (4 * size if size < 4096 else size + 4 * -(-size // 256))

    return counted


def _factored(parameter: Any) -> int:
    """Adafactor: a row and a column of float32 for a matrix (arXiv 1804.04235), a whole tensor for a vector."""
    shape: Sequence[int] = parameter.shape
    if len(shape) < 2:
        return 4 * parameter.numel()
    return 4 * (parameter.numel() // shape[-1] + parameter.numel() // shape[-2])


STATES: dict[str, Counted] = {
    **dict.fromkeys("adamw_torch adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla stable_adamw".split(), _like(2)),
    **dict.fromkeys("schedule_free_adamw schedule_free_radam".split(), _like(2)),
    **dict.fromkeys("adagrad rmsprop schedule_free_sgd".split(), _like(1)),
    "sgd": _like(0),
    "adafactor": _factored,
    "paged_adamw_32bit": _float32(2),
    "ademamix": _float32(3),
    "paged_ademamix_32bit": _float32(3),
    **dict.fromkeys("lion_32bit paged_lion_32bit rmsprop_bnb rmsprop_bnb_32bit".split(), _float32(1)),
    **dict.fromkeys("adamw_8bit adamw_bnb_8bit paged_adamw_8bit adamw_torch_8bit".split(), _blockwise(2)),
    **dict.fromkeys("lion_8bit paged_lion_8bit rmsprop_bnb_8bit".split(), _blockwise(1)),
    **dict.fromkeys("ademamix_8bit paged_ademamix_8bit".split(), _blockwise(3)),
}
"""Bytes of a parameter's state, by the optimizer's name; steps, of 4 bytes each, are left out."""


def state_bytes(optimizer: str, parameters: Iterable[Any]) -> tuple[list[int], str | None]:
    """Bytes of the state of each parameter, and a note where the optimizer isn't in the table (then AdamW's are counted)."""
    counted = STATES.get(optimizer)
    note = None
    if counted is None:
        counted = STATES["adamw_torch"]
        note = f"optimizer: what {optimizer} keeps is not known here; AdamW's state is counted instead"
    return [counted(parameter) for parameter in parameters], note
