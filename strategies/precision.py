"""Whether a CPU computes in bfloat16: `bf16: auto` without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["computes_in_bf16", "settle_bf16"]

WIDTH = 512
"""Hidden size from which products outweigh the casts of autocast. Measured on a CPU with AVX512-BF16: a training step of
SmolLM2-135M (width 576) takes half the time."""


def settle_bf16(cfg: Any, width: Callable[[], int | None]) -> Any:
    """Return the config with `bf16: auto` decided for a CPU: true where it multiplies bfloat16 and the model is wide.

    Args:
        cfg: a validated config; one that says what it wants, and fp16, stay as they are.
        width: gives the hidden size of the policy; called only where it decides.
    """
    if cfg.bf16 != "auto" or cfg.fp16:
        return cfg
    return cfg.model_copy(update={"bf16": multiplies_bf16() and (width() or 0) >= WIDTH})


def computes_in_bf16(cfg: Any) -> bool:
    """Whether a run of this config computes in bfloat16 on this machine."""
    if torch.cuda.is_available():
        return cfg.bf16 in (True, "full") or (cfg.bf16 == "auto" and not cfg.fp16 and torch.cuda.is_bf16_supported())
    return settle_bf16(cfg, lambda: _width(cfg)).bf16 in (True, "full")


def _width(cfg: Any) -> int | None:
    from strategies.models import load_config

    return getattr(load_config(cfg).get_text_config(), "hidden_size", None)


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
