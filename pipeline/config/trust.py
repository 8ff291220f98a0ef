"""Refusal of third-party code that a recipe would run without the user's consent."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["refuse_code_of_run", "refuse_remote_code"]

KEY = "trust_remote_code"
RISKY = {"trust_remote_code", "allow_all_kernels", "use_kernels", "weights_only", "code_revision", "kernel_config"}
RISKY |= {"attn_implementation", "experts_implementation", "auto_map"}
"""Arguments of `from_pretrained`, and values of model configs, that may run third-party code."""


def refuse_remote_code(recipe: str | Path, cfg: RunConfig, overrides: Iterable[str]) -> None:
    """Refuse a submitted recipe that would run a model repository's code, unless the command line allows it too.

    Raises:
        UserError: with how to allow it.
    """
    # A sweep could set the key in its trials.
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


def refuse_code_of_run(given: str, saved: Mapping[str, Any], overrides: Iterable[str] = (), rewards: bool = False) -> None:
    """Refuse a run whose saved config would run code that the command line doesn't allow.

    Args:
        given: the run, as the user gave it.
        saved: its `config.yaml`.
        overrides: `key=value` of the command line, which are allowed.
        rewards: whether its reward functions would be called.

    Raises:
        UserError: with the code, and how to allow it.
    """
    # A module that this process has imported already runs nothing new.
    named = {"plugins": [name for name in _names(saved.get("plugins")) if name not in sys.modules]}
    if rewards:
        trl = saved.get("trl")
        functions = _names(trl.get("reward_funcs")) if isinstance(trl, Mapping) else []
        # With a slash it is a reward model: weights, not code.
        named["trl.reward_funcs"] = [name for name in functions if "/" not in name]
    if saved.get(KEY):
        named[KEY] = _names(saved.get("base_model"))
    named["attn_implementation"] = [name for name in _names(saved.get("attn_implementation")) if "/" in name]  # a kernel's code
    for key in ("overrides_of_model_kwargs", "overrides_of_model_config"):
        value = saved.get(key)
        names = value if isinstance(value, Mapping) else {}
        # Model configs store some of these with an underscore: `_attn_implementation`.
        named[key] = sorted(str(name) for name in names if str(name).lstrip("_") in RISKY)
    # What the user has typed is the user's own choice.
    allowed = {override.partition("=")[0].strip() for override in overrides}
    if refused := [f"{key}: {', '.join(names)}" for key, names in named.items() if names and key not in allowed]:
        raise UserError(
            f"{given}: its config would run code here ({'; '.join(refused)}); give --trust if you know who wrote it"
        )


def _names(value: Any) -> list[str]:
    """Return the names of a key that takes one or several; the config rejects other values."""
    return [value] if isinstance(value, str) else [str(name) for name in value] if isinstance(value, list) else []
