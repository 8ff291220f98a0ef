"""Resolution of `bf16: auto` on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from strategies.models.config import load_config

__all__ = ["computes_in_bf16", "resolve_bf16"]

WIDTH = 512
"""Hidden size from which faster products outweigh the casts of autocast. Measured on a CPU with AVX512-BF16: a training step of
SmolLM2-135M (width 576) takes half the time."""


def resolve_bf16(cfg: Any, width: Callable[[], int | None]) -> Any:
    """Return the config with `bf16: auto` resolved for a CPU: true if it multiplies bfloat16 and the model is wide.

    Args:
        cfg: a validated config; returned unchanged if bf16 is not `auto`, or with fp16.
        width: returns the hidden size of the policy; called only if it decides.
    """
    if cfg.bf16 != "auto" or cfg.fp16:
        return cfg
    return cfg.model_copy(update={"bf16": multiplies_bf16() and (width() or 0) >= WIDTH})


def computes_in_bf16(cfg: Any) -> bool:
    """Return whether a run of this config computes in bfloat16 on this machine."""
    if torch.cuda.is_available():
        return cfg.bf16 in (True, "full") or (cfg.bf16 == "auto" and not cfg.fp16 and torch.cuda.is_bf16_supported())
    return resolve_bf16(cfg, lambda: _width(cfg)).bf16 in (True, "full")


def _width(cfg: Any) -> int | None:
    return getattr(load_config(cfg).get_text_config(), "hidden_size", None)


def multiplies_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
