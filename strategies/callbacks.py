"""Callbacks that plugins add to every run. Loads without torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from strategies.outside import OutsideError, RegistrationError, described, name_of, record_registration

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["register_callback", "registered_callbacks"]

CALLBACKS: dict[str, Callable[..., Any]] = {}
"""Module and name -> callback class, or factory that takes the config."""


def register_callback(callback: Callable[..., Any]) -> Any:
    """Add a callback to every run, in each of its workers; a decorator.

    Args:
        callback: a class of `transformers.TrainerCallback`, which is called without arguments; or a function of the config
            that returns such a callback, or None to add none to a run.

    Raises:
        RegistrationError: for anything else.
    """
    # Names distinguish callbacks, and all lambdas of a module have the same one.
    if not callable(callback) or getattr(callback, "__name__", "<lambda>") == "<lambda>":
        raise RegistrationError(
            f"callback {callback!r}: give a class of TrainerCallback, or a function (cfg) -> TrainerCallback that has a name"
        )
    record_registration()
    # A reloaded module replaces its callback, instead of adding a second one.
    CALLBACKS[name_of(callback)] = callback
    return callback


def registered_callbacks(cfg: Any) -> list[TrainerCallback]:
    """Create the callbacks that plugins have registered, for one run.

    Raises:
        OutsideError: for a function that fails, or returns anything else.
    """
    from transformers import TrainerCallback

    callbacks = []
    for name, make in CALLBACKS.items():
        try:
            # For each run again, as callbacks have state.
            callback = make() if isinstance(make, type) else make(cfg)
        except Exception as error:
            raise OutsideError(described(f"callback {name!r}", make, error)) from error
        if callback is not None and not isinstance(callback, TrainerCallback):
            raise OutsideError(f"callback {name!r}: must be a TrainerCallback or None, got {type(callback).__name__}")
        callbacks += [] if callback is None else [callback]
    return callbacks
