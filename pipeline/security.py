"""What a recipe may have the cluster run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["refuse_remote_code"]

KEY = "trust_remote_code"


def refuse_remote_code(recipe: str | Path, cfg: RunConfig, overrides: Iterable[str]) -> None:
    """Refuse a submitted recipe that would run a model repository's code, unless the command line says so as well.

    Raises:
        UserError: saying how to allow it.
    """
    searched = cfg.tune is not None and any(KEY in key for key in cfg.tune.space)
    if not cfg.trust_remote_code and not searched:
        return
    if searched or not any(override.partition("=")[0].strip() == KEY for override in overrides):
        where = f"tune.space.{KEY}" if searched else KEY
        advice = "remove it from the space, and allow it with" if searched else "remove it, or allow it with"
        raise UserError(
            f"{recipe}: {where}: runs Python code of the model's repository ({cfg.base_model}) on the cluster, which a recipe "
            f"that is submitted may not ask for by itself; {advice} --set {KEY}=true"
        )
