"""The trainer of pairs: dpo and ipo with a reference, simpo and orpo without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import DPOTrainer

from strategies.batch.pairs import PairBatch, WorkerStep
from strategies.inference.reference import reference_model
from strategies.losses.reference_free import nll
from strategies.losses.table import LOSSES, PAIR_LOSSES
from strategies.losses.types import LossOptions, PairLogps, averaged
from strategies.mixins import DistributedParallelMixin
from strategies.outside import OutsideError
from strategies.trainers.pair_step import implicit_rewards, mean_logratio, pair_logps, pair_sums, wpo_weights
from strategies.trainers.planned import PlannedTrainer
from strategies.trainers.start import check_start
from strategies.types import BatchKind

__all__ = ["AxolotlDPOTrainer"]


@dataclass(frozen=True)
class PairValues:
    """Inputs of the losses for B pairs; tensors of shape (B,)."""

    policy: PairLogps
    plain: PairLogps
    """`policy` without `ld_alpha`, which likelihood terms do not use."""
    reference: PairLogps | None
    weights: Tensor | None

    def columns(self) -> Tensor:
        """Stack all values into one tensor, shape (B, K)."""
        parts = [logps for logps in (self.policy, self.plain, self.reference) if logps is not None]
        tensors = [tensor for logps in parts for tensor in vars(logps).values()]
        tensors += [] if self.weights is None else [self.weights]
        return torch.stack([tensor.float() for tensor in tensors], dim=1)

    def like(self, columns: Tensor) -> PairValues:
        """Return the values of other pairs from their `columns`, which have the same layout as this object's."""
        values = list(columns.unbind(dim=1))
        policy, plain = (PairLogps(*(values.pop(0) for _ in range(4))) for _ in range(2))
        reference = None if self.reference is None else PairLogps(*(values.pop(0) for _ in range(4)))
        return PairValues(policy, plain, reference, None if self.weights is None else values.pop(0))


class AxolotlDPOTrainer(PlannedTrainer, DPOTrainer, DistributedParallelMixin):
    """Losses of `PAIR_LOSSES` on raw or prepared pairs.

    Differs from TRL's trainer in what `PlannedTrainer` adds, and in the losses, which are computed here: `sigmoid` supports
    label smoothing, and `simpo` and `orpo`, with `uses_reference=False`, run without a reference model. Losses that couple
    the pairs of a batch (aot, aot_unpaired, sft) are computed over the global batch, however it is cut into forwards.
    """

    batch_kind: ClassVar[BatchKind] = "pair"

    def training_step(self, model: Any, inputs: WorkerStep, num_items_in_batch: Any = None) -> Tensor:
        """Run a step; the first step of a run also checks that the policy starts at its reference."""
        self._check_packing()
        if self._must_check_start:
            model.eval()
            batch = inputs.to(self.args.device).batches[0]
            with torch.no_grad(), self.accelerator.autocast():
                check_start(self, batch.run(model).log_probs, self._reference_of(batch), batch.mask)
        return super().training_step(model, inputs, num_items_in_batch)

    @property
    def _couples(self) -> bool:
        return any(LOSSES[name].couples for name in self.loss_types)

    def _forward(self, model: Any, batch: PairBatch) -> Any:
        router: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return batch.run(model, self._statistics, **router)

    def _batch_loss(self, batch: PairBatch, outputs: Any, step: WorkerStep, whole: Tensor | None) -> Tensor:
        values = self._values(batch, outputs)
        try:
            loss = self._part_of_loss(batch, values, step.global_pairs, whole)
        except OutsideError as error:
            raise OutsideError(f"{error}; in a batch of the rows {', '.join(map(str, batch.row_ids))}") from error
        if self.aux_loss_enabled:
            # By the forward's part of the pairs, so that all forwards add up to one router loss.
            loss = loss + len(batch.positions) / step.global_pairs * self.router_aux_loss_coef * outputs.aux_loss
        loss = loss if batch.is_real else 0.0 * loss  # 0 instead of no backward: gradients are exchanged in it
        self._record_batch(batch, outputs, values, loss.detach() * step.global_pairs)
        return loss

    def _part_of_loss(self, batch: PairBatch, values: PairValues, global_pairs: int, whole: Tensor | None) -> Tensor:
        if whole is None:
            losses = self._losses(values)
            self._remember_losses(batch, losses)
            return losses.sum() / global_pairs
        # The other pairs are constants. Every forward computes the full loss: its gradient is that of its own pairs, and its
        # value is scaled to their part, so that the forwards of all workers add up to the loss.
        columns = values.columns()
        # No pair has a loss of its own: a value that isn't finite marks it instead.
        self._remember_losses(batch, columns.sum(dim=1))
        everything = whole.index_copy(0, batch.positions, columns)
        loss = self._losses(values.like(everything)).mean()
        return loss + (len(batch.positions) / global_pairs - 1) * loss.detach()

    def _whole_batch(self, model: Any, step: WorkerStep) -> Tensor:
        """Gather the values of all pairs of the global batch, without gradient: shape (global pairs, K)."""
        with torch.no_grad(), self.accelerator.autocast():
            local = [self._values(batch, batch.run(model, self._statistics)).columns() for batch in step.batches]
            table = local[0].new_zeros(step.global_pairs, local[0].shape[1])
            for batch, columns in zip(step.batches, local, strict=True):
                if batch.is_real:
                    table[batch.positions] = columns
        # One worker has the values of a pair, and the others 0.
        return self.accelerator.reduce(table, reduction="sum")

    def _values(self, batch: PairBatch, outputs: Any) -> PairValues:
        mask = batch.mask
        policy = pair_logps(outputs.log_probs, mask, self.ld_alpha)
        plain = policy if self.ld_alpha is None else pair_logps(outputs.log_probs, mask)
        reference = pair_logps(self._reference_of(batch), mask, self.ld_alpha) if self.uses_reference else None
        return PairValues(policy, plain, reference, wpo_weights(outputs, mask) if self.use_weighting else None)

    def _reference_of(self, batch: PairBatch) -> Tensor:
        """Return token log-probabilities under the reference, shape (2B, L): cached ones, or by a forward."""
        if batch.reference is not None:
            return batch.reference
        with reference_model(self) as frozen, torch.no_grad():
            return batch.run(frozen).log_probs

    def _losses(self, values: PairValues) -> Tensor:
        """Return the weighted sum of the losses for each pair, shape (B,)."""
        policy, reference = values.policy, values.reference
        if self.args.norm_loss and reference is not None:
            policy, reference = averaged(policy), averaged(reference)
        total = self.args.nll_alpha * nll(values.plain)
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            compared = (policy, reference) if LOSSES[name].reference else (values.plain, None)
            losses = PAIR_LOSSES[name](*compared, self._options())
            total = total + weight * (losses if values.weights is None else values.weights * losses)
        return total

    def _options(self) -> LossOptions:
        return LossOptions(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence=self.f_divergence_type,
            alpha=self.f_alpha_divergence_coef,
            gamma=self.args.simpo_gamma,
            discopop_tau=self.args.discopop_tau,
            own=self.args.loss_options or {},
        )

    @property
    def _statistics(self) -> tuple[str, ...]:
        """Statistics of the policy's tokens to compute besides their log-probabilities."""
        return ("entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if self.use_weighting else ()))

    def _record_batch(self, batch: PairBatch, outputs: Any, values: PairValues, loss_sum: Tensor) -> None:
        """Add this forward's pairs to the metrics.

        Args:
            loss_sum: sum of the losses of its pairs.
        """
        policy, reference = values.policy, values.reference
        if self.args.norm_loss and reference is not None:
            policy, reference = averaged(policy), averaged(reference)
        # Rewards are of what the loss compares; log-probabilities stay sums, as in TRL.
        sums = pair_sums(outputs, batch.mask, values.policy, implicit_rewards(policy, reference, self.beta))
        pairs = torch.tensor(len(batch.positions), device=loss_sum.device)
        if values.reference is not None:
            sums["kl"] = (mean_logratio(values.policy, values.reference).sum(), pairs)
        if self.args.nll_alpha or reference is None:
            sums["nll_loss"] = (nll(values.plain).sum(), pairs)
        if self.aux_loss_enabled:
            sums["aux_loss"] = (outputs.aux_loss, torch.ones_like(outputs.aux_loss))
        if self._mode == "eval":
            # TRL's `log` replaces transformers' mean over batches by it, in which a small last batch counts as much as others.
            sums["loss"] = (loss_sum, pairs)
        self._record(sums, torch.tensor(batch.sequence_tokens, device=loss_sum.device), batch.is_real)
