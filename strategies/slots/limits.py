"""Most tokens of joint forwards. Loads without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.config.schema import StrategyConfig

__all__ = ["JOINT_TOKENS", "joint_tokens"]

JOINT_TOKENS = {"cpu": 512, "cuda": 16384}
"""Tokens up to which rows are joined, by device: with more, one forward is hardly faster (`benchmarks.joint_forwards`), and its
activations take memory that turns don't need."""


def joint_tokens(cfg: StrategyConfig, device: str) -> int:
    """Return the most tokens of a joint forward in which rows of a trial may stand, by its config; 0 if in none."""
    return 0 if cfg.gradient_checkpointing or cfg.full_determinism else JOINT_TOKENS[device]
