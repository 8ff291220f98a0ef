"""In what precision the reference computes: decided on the driver, since it is a part of the scores' name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import UserError

__all__ = ["Precision", "resolve_precision", "settle"]


@dataclass(frozen=True)
class Precision:
    """`weights` and `autocast` are names of torch dtypes; `autocast` is None where there is none."""

    weights: str
    autocast: str | None
    tf32: bool

    def as_inputs(self) -> dict[str, Any]:
        """What the fingerprint covers."""
        return asdict(self)


def resolve_precision(cfg: Any, use_gpu: bool) -> Precision:
    """The precision in which training would run the reference, on actors that have GPUs or not.

    The driver may be a machine without a GPU; then the cluster's GPUs are taken to have bfloat16 and TF32, and an actor
    whose GPU hasn't says so.

    Raises:
        UserError: for float16 on actors without a GPU.
    """
    if cfg.fp16 and not use_gpu:
        raise UserError("fp16: float16 needs a GPU and the scoring actors have none; use bf16: true, or remove it")
    if not use_gpu:
        cfg = settle(cfg)
    bf16 = cfg.bf16 is True or cfg.bf16 == "full" or (cfg.bf16 == "auto" and use_gpu and not cfg.fp16 and _gpu_has_bf16())
    half = cfg.bf16 == "full" or cfg.load_in_4bit or cfg.load_in_8bit
    return Precision(
        weights="bfloat16" if half else "float32",
        autocast="bfloat16" if bf16 else "float16" if cfg.fp16 else None,
        tf32=use_gpu and (_gpu_has_tf32() if cfg.tf32 == "auto" else bool(cfg.tf32)),
    )


def settle(cfg: Any) -> Any:
    """The config with `bf16: auto` decided for workers without a GPU, by this machine's CPU: all of them do the same."""
    from strategies.models import load_config
    from strategies.precision import settle_bf16

    return settle_bf16(cfg, lambda: getattr(load_config(cfg).get_text_config(), "hidden_size", None))


def _gpu_has_bf16() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def _gpu_has_tf32() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
