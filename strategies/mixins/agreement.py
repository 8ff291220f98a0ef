"""What all ranks decide together before an optimizer step: whether it is taken, and whether it is the last for now."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import Trainer

from strategies.ledger import Ledger, RowId

__all__ = ["AgreementMixin", "NonFiniteLossError"]

NAMED = 20
"""Rows that a message names at most."""
STEP_IN_BACKWARD = ("lomo", "adalomo")


class NonFiniteLossError(ValueError):
    """A step's loss or gradient is not finite; the step was not taken, and all ranks raise."""


class AgreementMixin(Trainer):
    """Takes no step whose loss, on any rank, or whose gradient isn't finite; and stops after a step when it is asked to.

    `nonfinite_loss: stop` raises `NonFiniteLossError` before the optimizer's step. `skip` drops the gradients, so that weights
    and moments stay as they are; the learning rate goes on with the steps. Where the backward pass takes the optimizer's
    step (DeepSpeed, LOMO), trainers that can tell before it ask `_refuse`; otherwise such a step ends the run.

    Ranks agree in one sum of three numbers per step.

    Attributes:
        ledger: which rows every step was taken on, and which steps were skipped.
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
        """Save a checkpoint at the end of the step that runs, then stop. Any rank may ask, from any thread."""
        self._stop_requested = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, until the end or a stop."""
        self.stopped, self._stopping, self._saved_step = False, False, None
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step whose loss is looked at before the optimizer's."""
        loss = super().training_step(*args, **kwargs)
        self._step_losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; transformers asks for it just before the optimizer's step, on all ranks."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses, self._step_losses = self._step_losses, []
        asked = torch.tensor(self._stop_requested, device=self.args.device)
        votes = torch.stack([~_are_finite(losses, self.args.device), ~self._is_finite(norm), asked]).float()
        bad_loss, bad_norm, stop = self.accelerator.reduce(votes, reduction="sum").tolist()
        self._stopping = stop > 0 and self.state.global_step + 1 < self.state.max_steps
        refused, self._refused = self._refused, False
        if refused or bad_loss or bad_norm:
            what = "loss" if refused or bad_loss else "gradient norm"
            self._leave_out(model, what, taken=not refused and self._steps_in_backward)
        return norm

    @property
    def _steps_in_backward(self) -> bool:
        """Whether gradients are used up by the backward pass."""
        layerwise = str(self.args.optim).endswith("layerwise")
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return deepspeed or layerwise or self.args.optim in STEP_IN_BACKWARD

    def _is_finite(self, norm: Any) -> torch.Tensor:
        """Whether a norm is finite. In float16 an overflow is the gradient scaler's to handle; DeepSpeed's first is None."""
        if norm is None or self.accelerator.scaler is not None:
            norm = 0.0
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return torch.isfinite(torch.as_tensor(whole, device=self.args.device)).all()

    def _refuse(self, loss: torch.Tensor) -> bool:
        """Whether a loss isn't finite on any rank, so that its backward pass must not run; every rank must call it."""
        bad = (~torch.isfinite(loss.detach())).any().float()
        self._refused = bool(self.accelerator.reduce(bad, reduction="sum").item())
        return self._refused

    def _leave_out(self, model: Any, what: str, taken: bool) -> None:
        """Drop the step, or end the run."""
        if self.args.nonfinite_loss == "stop" or taken:
            raise NonFiniteLossError(self._complaint(what, taken))
        model.zero_grad()
        self.ledger.skip()

    def _complaint(self, what: str, taken: bool) -> str:
        faulty, all_rows = (gather_object(rows) if self.args.world_size > 1 else rows for rows in self._suspects())
        whose = f" for {_named(faulty)}" if faulty else ""
        if all_rows and not faulty:
            whose = f"; its global batch has {_named(all_rows)}"
        done = "the backward pass has taken the optimizer's step here" if taken else "the step was not taken"
        remedy = "mend or remove such rows, or lower learning_rate"
        if self.args.nonfinite_loss == "stop":
            remedy += "; nonfinite_loss: skip goes on without such steps"
        return f"step {self.state.global_step + 1}: the {what} is not finite{whose}; {done}: {remedy}"

    def _suspects(self) -> tuple[list[RowId], list[RowId]]:
        """Rows of this rank whose own loss isn't finite, and all of its rows in the step, where they are known."""
        return [], []

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self._saved_step = self.state.global_step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After a step and after an epoch; a stop saves once, and after what is due at the end of an epoch."""
        if self._stopping:
            ends_epoch = float(self.state.epoch or 0).is_integer()
            if self.stopped and not ends_epoch:
                return  # transformers takes the stop for the end of the epoch
            if self.stopped or not ends_epoch:
                self.control.should_save = self._saved_step != self.state.global_step
            self.control.should_training_stop = self.stopped = True
            self._stop_requested = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves nan of an infinite one


def _are_finite(losses: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    flags = [torch.isfinite(loss).all().to(device) for loss in losses]
    return torch.stack(flags).all() if flags else torch.tensor(True, device=device)


def _named(rows: list[RowId]) -> str:
    """Rows by their ids, not too many of them."""
    shown = ", ".join(str(row) for row in sorted(rows, key=str)[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) != 1)} {shown}{more}"
