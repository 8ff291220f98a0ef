"""Collective decisions of all ranks before an optimizer step: skip it if it is not finite, stop after it if requested."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer

from strategies.batch.row_ledger import Ledger, RowId
from strategies.compat import clear_logged_loss

__all__ = ["AgreementMixin", "NonFiniteLossError"]

NAMED = 20
"""Maximum number of rows that a message names."""
STEP_IN_BACKWARD = ("lomo", "adalomo")


class NonFiniteLossError(ValueError):
    """A step's loss or gradient is not finite; the step was not taken, and all ranks raise."""


class AgreementMixin(Trainer):
    """Takes no step whose loss, on any rank, or gradient is not finite; stops after a step when requested.

    `nonfinite_loss: stop` raises `NonFiniteLossError` before the optimizer step. `skip` drops the gradients, so that weights
    and moments stay unchanged; the learning-rate schedule advances. If the backward pass takes the optimizer step (DeepSpeed,
    LOMO), trainers that know the loss before it call `_refuse`; otherwise a non-finite step ends the run.

    Ranks agree by one sum of three numbers per step.

    Attributes:
        ledger: the rows of every step, and the skipped steps.
        stopped: whether the run was stopped by `request_stop` before its last step.
    """

    ledger: Ledger

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopped = False
        self._stop_requested = False
        self._stopping = False
        self._refused = False
        self._saved_step: int | None = None
        self._step_losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def request_stop(self) -> None:
        """Save a checkpoint at the end of the current step, then stop. May be called on any rank, from any thread."""
        self._stop_requested = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train until the end or a requested stop."""
        # Not `_stop_requested`: a stop may be requested while the run is still being prepared.
        self.stopped, self._stopping, self._saved_step = False, False, None
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a step, and keep its loss for the check before the optimizer step."""
        loss = super().training_step(*args, **kwargs)
        # As a tensor: to read it here would wait for the device after every forward.
        self._step_losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm, and decide on the step: transformers calls this just before the optimizer step, on all ranks."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self._step_losses = self._step_losses, []
        stop_requested = torch.tensor(self._stop_requested, device=self.args.device)
        # One collective, read once, so the device is waited for once a step.
        votes = torch.stack([~_are_finite(losses, self.args.device), ~self._is_finite(norm), stop_requested]).float()
        bad_loss, bad_norm, stop = self.accelerator.reduce(votes, reduction="sum").tolist()
        # The last step ends the run anyway, as a finished one.
        self._stopping = stop > 0 and self.state.global_step + 1 < self.state.max_steps
        refused, self._refused = self._refused, False
        if refused or bad_loss or bad_norm:
            what = "loss" if refused or bad_loss else "gradient norm"
            self._skip_step(model, what, taken=not refused and self._steps_in_backward)
        return norm

    @property
    def _steps_in_backward(self) -> bool:
        """Whether the backward pass takes the optimizer step."""
        # transformers steps these in hooks on the gradients (`register_post_accumulate_grad_hook`).
        layerwise = str(self.args.optim).endswith("layerwise")
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return deepspeed or layerwise or self.args.optim in STEP_IN_BACKWARD

    def _is_finite(self, norm: Any) -> torch.Tensor:
        """Return whether a norm is finite. In float16 the gradient scaler handles overflows; DeepSpeed's first norm is None."""
        if norm is None or self.accelerator.scaler is not None:
            norm = 0.0
        # FSDP2's norm is a DTensor.
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.isfinite(torch.as_tensor(whole, device=self.args.device)).all()

    def _refuse(self, loss: torch.Tensor) -> bool:
        """Return whether a loss is not finite on any rank, so that its backward must not run. Every rank must call it."""
        bad = (~torch.isfinite(loss.detach())).any().float()
        self._refused = bool(self.accelerator.reduce(bad, reduction="sum").item())
        return self._refused

    def _skip_step(self, model: Any, what: str, taken: bool) -> None:
        """Skip the step, or raise if it can't be skipped."""
        if self.args.nonfinite_loss == "stop" or taken:
            raise NonFiniteLossError(self._nonfinite_message(what, taken))
        # torch's optimizers pass over parameters without a gradient.
        model.zero_grad()
        self.ledger.skip()

    def _nonfinite_message(self, what: str, taken: bool) -> str:
        # All ranks raise, by the same votes, so all of them gather.
        bad_rows, all_rows = (gather_object(rows) if self.args.world_size > 1 else rows for rows in self._bad_rows())
        whose = f" for {_named(bad_rows)}" if bad_rows else ""
        if all_rows and not bad_rows:
            whose = f"; its global batch has {_named(all_rows)}"
        done = "the backward pass has taken the optimizer's step here" if taken else "the step was not taken"
        remedy = "mend or remove such rows, or lower learning_rate"
        if self.args.nonfinite_loss == "stop":
            remedy += "; nonfinite_loss: skip goes on without such steps"
        return f"step {self.state.global_step + 1}: the {what} is not finite{whose}; {done}: {remedy}"

    def _bad_rows(self) -> tuple[list[RowId], list[RowId]]:
        """Return this rank's rows with a non-finite loss, and all of its rows in the step, as far as they are known."""
        return [], []

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._saved_step = self.state.global_step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Apply a stop after a step, or after the end of an epoch if the step is its last; save once."""
        if self._stopping:
            # Exact: transformers adds (step + 1) / steps to the epoch's number, 1 at its last step.
            ends_epoch = float(self.state.epoch or 0).is_integer()
            if self.stopped and not ends_epoch:
                return  # transformers calls this again at a stop, as if the epoch had ended
            if self.stopped or not ends_epoch:
                self.control.should_save = self._saved_step != self.state.global_step
            self.control.should_training_stop = self.stopped = True
            self._stop_requested = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        clear_logged_loss(self)


def _are_finite(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    flags = [torch.isfinite(loss).all().to(device) for loss in losses]
    return torch.stack(flags).all() if flags else torch.tensor(True, device=device)


def _named(rows: list[RowId]) -> str:
    """Format row ids, at most `NAMED` of them."""
    shown = ", ".join(str(row) for row in sorted(rows, key=str)[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) != 1)} {shown}{more}"
