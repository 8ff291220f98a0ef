"""Precision of the reference: resolved on the driver, since the scores' fingerprint includes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.planning import resolve_bf16

__all__ = ["Precision", "resolve_precision"]


@dataclass(frozen=True)
class Precision:
    """`weights` and `autocast` are names of torch dtypes; `autocast` is None without autocast."""

    weights: str
    autocast: str | None
    tf32: bool

    def as_inputs(self) -> dict[str, Any]:
        """Return the inputs of the fingerprint."""
        return asdict(self)


def resolve_precision(cfg: RunConfig, use_gpu: bool) -> Precision:
    """Return the precision in which training would run the reference, on actors with or without GPUs.

    On a driver without a GPU, the cluster's GPUs are assumed to have bfloat16 and TF32; an actor whose GPU lacks bfloat16
    raises.

    Raises:
        UserError: for float16 on actors without a GPU.
    """
    if cfg.fp16 and not use_gpu:
        raise UserError("fp16: float16 needs a GPU and the scoring actors have none; use bf16: true, or remove it")
    if not use_gpu:
        # By the driver's CPU, for all actors: their numbers go into one store.
        cfg = resolve_bf16(cfg)
    bf16 = cfg.bf16 is True or cfg.bf16 == "full" or (cfg.bf16 == "auto" and use_gpu and not cfg.fp16 and _gpu_has_bf16())
    # As `strategies.models.loading` loads them: what isn't quantized of a quantized model is bfloat16.
    half = cfg.bf16 == "full" or cfg.load_in_4bit or cfg.load_in_8bit
    return Precision(
        weights="bfloat16" if half else "float32",
        autocast="bfloat16" if bf16 else "float16" if cfg.fp16 else None,
        tf32=use_gpu and (_gpu_has_tf32() if cfg.tf32 == "auto" else bool(cfg.tf32)),
    )


def _gpu_has_bf16() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def _gpu_has_tf32() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
