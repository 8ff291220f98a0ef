"""The end of a run, also of a resumed one."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, Trainer

__all__ = ["EndingMixin"]


class EndingMixin(Trainer):
    """Ends a resumed run where it would have ended: early stopping keeps its count, and no step follows the last one.

    transformers resets the count on resume, and takes a step before it checks whether any is left.
    """

    @property
    def ended_early(self) -> bool:
        """Whether early stopping has ended the run, now or before its checkpoint was written."""
        callbacks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
        return any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in callbacks)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        # transformers restores callbacks only on request, by new objects in place of those that were passed in.
        saved: Any = self.state.stateful_callbacks.get(EarlyStoppingCallback.__name__)
        for callback in self.callback_handler.callbacks if saved else ():
            if isinstance(callback, EarlyStoppingCallback):
                # A list if the run had several of them.
                first = saved[0] if isinstance(saved, list) else saved
                callback.early_stopping_patience_counter = first["attributes"]["early_stopping_patience_counter"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.ended_early:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
