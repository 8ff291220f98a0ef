"""The trainer of pairs: dpo and ipo beside a reference, simpo and orpo without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import DPOTrainer

from strategies.base import BatchKind
from strategies.errors import OutsideError
from strategies.loss_traits import LOSSES
from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps, averaged, nll
from strategies.mixins import DistributedParallelMixin
from strategies.pair_batch import PairBatch, StepShare
from strategies.pair_step import implicit_rewards, mean_logratio, pair_logps, pair_sums, wpo_weights
from strategies.reference import reference_model
from strategies.trainers.planned import PlannedTrainer

__all__ = ["AxolotlDPOTrainer"]


@dataclass(frozen=True)
class PairValues:
    """What the losses read of B pairs; tensors of shape (B,)."""

    policy: PairLogps
    plain: PairLogps
    """As `policy`, every token in full: likelihood terms know no `ld_alpha`."""
    reference: PairLogps | None
    weights: Tensor | None

    def columns(self) -> Tensor:
        """All numbers as one tensor, shape (B, K)."""
        parts = [logps for logps in (self.policy, self.plain, self.reference) if logps is not None]
        tensors = [tensor for logps in parts for tensor in vars(logps).values()]
        tensors += [] if self.weights is None else [self.weights]
        return torch.stack([tensor.float() for tensor in tensors], dim=1)

    def like(self, columns: Tensor) -> PairValues:
        """The values of other pairs, of which the same numbers are known."""
        numbers = list(columns.unbind(dim=1))
        policy, plain = (PairLogps(*(numbers.pop(0) for _ in range(4))) for _ in range(2))
        reference = None if self.reference is None else PairLogps(*(numbers.pop(0) for _ in range(4)))
        return PairValues(policy, plain, reference, None if self.weights is None else numbers.pop(0))


class AxolotlDPOTrainer(PlannedTrainer, DPOTrainer, DistributedParallelMixin):
    """Losses of `PAIR_LOSSES` on raw or prepared pairs.

    Differs from TRL's trainer in what `PlannedTrainer` adds, and in this: the losses are computed here, so `sigmoid` knows
    label smoothing, and `simpo` and `orpo`, with `uses_reference=False`, run without a reference model. Losses that compare
    the pairs of a batch (aot, aot_unpaired, sft) do so over the global batch, whatever its forwards.
    """

    batch_kind: ClassVar[BatchKind] = "pair"

    @property
    def _couples(self) -> bool:
        return any(LOSSES[name].couples for name in self.loss_types)

    def _batch_loss(self, model: Any, batch: PairBatch, share: StepShare, whole: Tensor | None) -> Tensor:
        outputs = batch.pairs.run(model, self._statistics)
        values = self._values(batch, outputs)
        try:
            loss = self._part_of_loss(batch, values, share.global_pairs, whole)
        except OutsideError as error:
            raise OutsideError(f"{error}; in a batch of the rows {', '.join(map(str, batch.row_ids))}") from error
        if self.aux_loss_enabled:
            loss = loss + len(batch.places) / share.global_pairs * self.router_aux_loss_coef * outputs.aux_loss
        loss = loss if batch.counts else 0.0 * loss
        self._record_batch(batch, outputs, values, loss.detach() * share.global_pairs)
        return loss

    def _part_of_loss(self, batch: PairBatch, values: PairValues, global_pairs: int, whole: Tensor | None) -> Tensor:
        if whole is None:
            losses = self._losses(values)
            self._watch(batch, losses)
            return losses.sum() / global_pairs
        # The other pairs are constants; of the value, which every forward has in full, this one takes its part.
        columns = values.columns()
        self._watch(batch, columns.sum(dim=1))
        everything = whole.index_copy(0, batch.places, columns)
        loss = self._losses(values.like(everything)).mean()
        return loss + (len(batch.places) / global_pairs - 1) * loss.detach()

    def _whole_batch(self, model: Any, share: StepShare) -> Tensor:
        """The numbers of all pairs of the global batch, without gradient: shape (global pairs, K)."""
        with torch.no_grad(), self.accelerator.autocast():
            own = [(batch, self._values(batch, batch.pairs.run(model, self._statistics)).columns()) for batch in share.batches]
            table = own[0][1].new_zeros(share.global_pairs, own[0][1].shape[1])
            for batch, columns in own:
                if batch.counts:
                    table[batch.places] = columns
        return self.accelerator.reduce(table, reduction="sum")

    def _values(self, batch: PairBatch, outputs: Any) -> PairValues:
        mask = batch.pairs.mask
        policy = pair_logps(outputs.log_probs, mask, self.ld_alpha)
        plain = policy if self.ld_alpha is None else pair_logps(outputs.log_probs, mask)
        reference = None
        if self.uses_reference:
            per_token = batch.pairs.reference
            if per_token is None:
                with reference_model(self) as frozen, torch.no_grad():
                    per_token = batch.pairs.run(frozen).log_probs
            reference = pair_logps(per_token, mask, self.ld_alpha)
        return PairValues(policy, plain, reference, wpo_weights(outputs, mask) if self.use_weighting else None)

    def _losses(self, values: PairValues) -> Tensor:
        """The weighted sum of the losses of each pair, shape (B,)."""
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
        """Of the policy's tokens, beside their log-probabilities."""
        return ("entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if self.use_weighting else ()))

    def _record_batch(self, batch: PairBatch, outputs: Any, values: PairValues, loss_sum: Tensor) -> None:
        """Count this forward's pairs in the metrics.

        Args:
            loss_sum: sum of the losses of its pairs.
        """
        policy, reference = values.policy, values.reference
        if self.args.norm_loss and reference is not None:
            policy, reference = averaged(policy), averaged(reference)
        sums = pair_sums(outputs, batch.pairs.mask, values.policy, implicit_rewards(policy, reference, self.beta))
        pairs = torch.tensor(len(batch.places), device=loss_sum.device)
        if values.reference is not None:
            sums["kl"] = (mean_logratio(values.policy, values.reference).sum(), pairs)
        if self.args.nll_alpha or reference is None:
            sums["nll_loss"] = (nll(values.plain).sum(), pairs)
        if self.aux_loss_enabled:
            sums["aux_loss"] = (outputs.aux_loss, torch.ones_like(outputs.aux_loss))
        if self._mode == "eval":
            sums["loss"] = (loss_sum, pairs)
        self._record(sums, torch.tensor(batch.sequence_tokens, device=loss_sum.device), batch.counts)
