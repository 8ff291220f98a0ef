"""Training and evaluation by the batch plan: one item of the data loader is one worker's part of a global batch."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from strategies.batch.loader import (
    ForwardLimits,
    StepLoader,
    check_pictures,
    check_positions,
    check_prompt_ends,
    check_scores,
    check_tokens_of_pictures,
    pair_lengths,
    too_long,
)
from strategies.batch.pairs import PairBatch, PairCollator, WorkerStep
from strategies.batch.plan import BatchPlan, packed_tokens
from strategies.batch.row_ledger import RowId
from strategies.compat import set_exchange, tokenizer_of
from strategies.dataset_rows import have_pictures
from strategies.models.sharding import disable_engine_accumulation
from strategies.packing.support import RowScorer, is_divided, prepare_packing, try_packing, why_not_packed
from strategies.trainers.base import PreferenceTrainer

__all__ = ["PlannedTrainer"]

logger = logging.getLogger(__name__)

EVALUATED_TOGETHER = 32
"""Minimum pairs per worker of an evaluation's global batch, so that packed rows are full."""


class PlannedTrainer(PreferenceTrainer):
    """Trains on global batches that depend only on seed, epoch, step and size.

    Each worker runs its part of a global batch in forwards of at most `tokens_per_forward` tokens (packed) or
    `per_device_train_batch_size` pairs (padded), one backward pass per forward; gradients are exchanged in the last one.
    The weight of every pair is 1 / size of the global batch.

    Attributes:
        global_batch_size: pairs of an optimizer step, over all workers.
        packed: whether batches are packed rows.
        padded_because: why they are padded although packing was requested; None where they are packed.
        row_scorer: runs the packed rows of training steps in place of the model, where it shares forwards with others.
    """

    row_scorer: RowScorer | None = None

    def _init_trl(self, **kwargs: Any) -> None:
        self._step_batches: list[PairBatch] = []
        self._pair_losses: list[tuple[PairBatch, torch.Tensor]] = []
        # `training_step` accumulates; transformers' loop sees one batch per step.
        args = copy.copy(kwargs["args"])
        default = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.global_batch_size = args.global_batch_size or default
        args.gradient_accumulation_steps = 1
        disable_engine_accumulation(args)
        super()._init_trl(**{**kwargs, "args": args})
        # After TRL's constructor: packed rows need a forward around that of TRL's fused head.
        self.padded_because = self._why_not_packed() if args.sample_packing else None
        self.packed = args.sample_packing and self.padded_because is None
        self._packing_is_checked = not (self.packed and self.is_deepspeed_enabled and any(map(is_divided, self._models())))
        if self.packed:
            for model in self._models():
                prepare_packing(model)
        elif args.sample_packing:
            size = args.per_device_train_batch_size
            self.notes.append(f"batches are padded, {size} pairs a forward, not packed: {self.padded_because}")
            logger.warning(self.notes[-1])

    def _models(self) -> list[Any]:
        """Return the policy and, if there is one, the reference model."""
        models = [self.model, getattr(self, "ref_model", None)]
        return [self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models if model is not None]

    def _why_not_packed(self) -> str | None:
        if self.aux_loss_enabled:
            return f"the router loss of {self.model.config.model_type} is computed of padded batches"
        longest = self.args.max_length if self.args.max_length is not None else sys.maxsize
        reasons = (why_not_packed(model, longest, self.vision) for model in self._models())
        return next((reason for reason in reasons if reason is not None), None)

    def _check_packing(self) -> None:
        """Check packed rows at the first forward, where ZeRO-3 partitioned the weights before they could be checked."""
        if self._packing_is_checked:
            return
        for model in (self.model_wrapped, getattr(self, "ref_model", None)):
            if model is not None and (reason := try_packing(model)) is not None:
                raise ValueError(f"sample_packing: {reason}; set sample_packing: false")
        self._packing_is_checked = True

    # Batches

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the pairs of an optimizer step, over all workers."""
        return self.global_batch_size

    def get_train_dataloader(self) -> StepLoader:
        """Return the loader of the steps of an epoch."""
        args, rows = self.args, self.train_dataset
        if not hasattr(rows, "__len__"):
            raise ValueError("train_dataset: rows are shuffled as a whole; give a datasets.Dataset or a list, no stream")
        seed = args.data_seed if args.data_seed is not None else args.seed
        plan = BatchPlan(len(rows), self.global_batch_size, seed, args.dataloader_drop_last)
        return self._loader(rows, plan, args.per_device_train_batch_size, "train_dataset")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """Return the loader of evaluation rows, in their order."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("eval_dataset: nothing to evaluate on; set trainer.eval_dataset, or hand rows to evaluate()")
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return self._evaluation_loader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        """Return the loader of `test_dataset`, as `get_eval_dataloader`."""
        return self._evaluation_loader(test_dataset)

    def _evaluation_loader(self, rows: Any) -> StepLoader:
        # Rows that are given to `evaluate` may be raw.
        rows = self._prepare_split(rows, "eval")
        each = self.args.per_device_eval_batch_size
        # A loss that couples pairs is computed over global batches, as in training.
        together = self.global_batch_size if self._couples else max(each, EVALUATED_TOGETHER) * self.args.world_size
        plan = BatchPlan(len(rows), together, seed=None)
        return self._loader(rows, plan, each, "eval_dataset")

    def _loader(self, rows: Any, plan: BatchPlan, most_rows: int, name: str) -> StepLoader:
        args = self.args
        lengths = pair_lengths(rows)
        check_scores(rows, lengths, name)
        check_positions(lengths, self.accelerator.unwrap_model(self.model).config, args.max_length, name)
        tokens = packed_tokens(lengths, args.max_length, args.truncation_mode)
        limits = ForwardLimits(args.world_size, args.process_index, self._budget(tokens, name), most_rows)
        padding = self.data_collator
        if self.packed:
            # A packed row is limited by its tokens alone.
            limits, padding = ForwardLimits(limits.world_size, limits.rank, limits.budget, None), None
        vision = self.vision if have_pictures(rows) else None
        if self.vision is not None:
            check_tokens_of_pictures(rows, self.vision.image_token, name)
        if vision is not None:
            keeps_start = args.truncation_mode == "keep_start"
            check_pictures(rows, lengths, args.max_length, keeps_start, vision.image_token, name)
            if self.packed:
                check_prompt_ends(rows, vision.image_token, name)
        collate = PairCollator(
            args.max_length,
            args.truncation_mode,
            padding,
            args.pad_to_multiple_of,
            tokenizer_of(self).pad_token_id or 0,
            vision,
        )
        return StepLoader(
            rows,
            tokens,
            plan,
            limits,
            collate,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _budget(self, tokens: np.ndarray, name: str) -> int:
        """Return the maximum tokens of a forward; padded forwards are limited by their rows."""
        if not self.packed:
            return sys.maxsize
        args = self.args
        multiple = args.pad_to_multiple_of or 1
        budget = args.tokens_per_forward
        if budget is None:
            # The longest pair is two sequences of max_length, padded up to the multiple.
            budget = 2 * args.max_length if args.max_length is not None else int(tokens.max())
            budget = -(-budget // multiple) * multiple
        # Rounded down: `pack` pads a row up to the multiple, which must not pass the budget.
        if (row := too_long(tokens, budget // multiple * multiple)) is not None:
            rounded = f", in multiples of {multiple} (pad_to_multiple_of)" if multiple > 1 else ""
            raise ValueError(
                f"tokens_per_forward: row {row} of {name} has {tokens[row]} tokens (prompt, chosen and rejected), and a "
                f"forward takes {budget}{rounded}; set it to {-(-tokens.max() // multiple) * multiple} or more, or shorten the "
                "rows (sequence_len)"
            )
        return budget // multiple * multiple

    # Steps

    @property
    def _couples(self) -> bool:
        """Whether the loss of a pair depends on other pairs of the global batch."""
        raise NotImplementedError

    def _whole_batch(self, model: Any, step: WorkerStep) -> Any:
        """Gather the values of the global batch that a loss that couples pairs needs."""
        raise NotImplementedError

    def _forward(self, model: Any, batch: PairBatch) -> Any:
        """Run one forward; return the model's outputs."""
        raise NotImplementedError

    def _batch_loss(self, batch: PairBatch, outputs: Any, step: WorkerStep, whole: Any) -> torch.Tensor:
        """Return a forward's part of the global batch's loss; the parts of all forwards and workers add up to it.

        Args:
            outputs: of `_forward`.
        """
        raise NotImplementedError

    def _needs_whole_batch(self, step: WorkerStep) -> bool:
        """Return whether the loss couples pairs of different forwards or workers."""
        return self._couples and (len(step.batches) > 1 or self.args.world_size > 1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Take the next step from the loader."""
        # No number of items: `_batch_loss` divides by the pairs of the global batch itself.
        with self.speed.clock.part("data"):
            return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: WorkerStep, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run this worker's forwards and backwards; the mean of the results over workers is the loss of the global batch."""
        model.train()
        # As in transformers' step, which isn't called: schedule-free optimizers evaluate with other weights.
        if (schedule_free := getattr(self.optimizer, "train", None)) is not None:
            schedule_free()
        step = inputs.to(self.args.device)
        whole = self._whole_batch(model, step) if self._needs_whole_batch(step) else None
        # transformers averages gradients and losses over workers, and the parts of the loss are to be summed.
        scale = self.args.world_size
        total = torch.zeros((), device=self.args.device)
        self._pair_losses = []
        self._step_batches = [batch for batch in step.batches if batch.is_real]
        self.ledger.feed(row for batch in self._step_batches for row in batch.row_ids)
        for number, batch in enumerate(step.batches, start=1):
            self.speed.clock.enter("forward")
            self._count(batch)
            is_last = number == len(step.batches)
            with self._exchange(model, now=is_last):
                outputs = self._training_forward(model, batch)
                with self.accelerator.autocast():
                    loss = scale * self._batch_loss(batch, outputs, step, whole)
                total += loss.detach()
                if self._steps_in_backward and self._refuse(loss):
                    # All ranks leave the loop here: `_refuse` has reduced its answer.
                    self._drop_gradients(model)
                    break
                self.speed.clock.enter("backward")
                self.accelerator.backward(loss, **self._backward_options())
                if self.row_scorer is not None:
                    self.row_scorer.backward(is_last)
        self.speed.clock.enter("optimizer")
        # In place of `AgreementMixin.training_step`, which isn't called.
        self._step_losses.append(total)
        self._empty_cache()
        return total

    def _training_forward(self, model: Any, batch: PairBatch) -> Any:
        if self.row_scorer is not None:
            return self._forward(self.row_scorer, batch)
        with self.accelerator.autocast():
            return self._forward(model, batch)

    def _count(self, batch: PairBatch) -> None:
        """Count a forward and backward, and the reference's forward where it runs beside the policy."""
        # A forward without real rows computes what others need, but no row of the step.
        if batch.is_real:
            is_live = self.uses_reference and batch.reference is None
            self.speed.count(len(batch.positions), batch.fed_tokens, batch.work, forwards=batch.work if is_live else None)

    def _exchange(self, model: Any, now: bool) -> AbstractContextManager[Any]:
        """Context of a backward pass that exchanges gradients between workers if `now`, else only accumulates them."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return self._sync_gradients(now)
        return nullcontext() if now else self.accelerator.no_sync(model)

    @contextmanager
    def _sync_gradients(self, now: bool) -> Iterator[None]:
        """Set accelerate's `sync_gradients` for one backward: DeepSpeed steps only when it is True."""
        state = self.accelerator.gradient_state
        set_exchange(state, now)
        try:
            yield
        finally:
            set_exchange(state, True)

    def _drop_gradients(self, model: Any) -> None:
        """Drop the gradients accumulated in this step, also those that DeepSpeed keeps after `zero_grad`."""
        model.zero_grad()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.optimizer.zero_grad()
            for name in ("averaged_gradients", "all_grad_tensors"):
                held = getattr(model.optimizer, name, {})
                held.update(dict.fromkeys(held))

    def _remember_losses(self, batch: PairBatch, per_pair: torch.Tensor) -> None:
        """Keep the loss of each pair, shape (B,), for the error message if the step is not finite."""
        if batch.is_real and self._mode == "train":
            self._pair_losses.append((batch, per_pair.detach()))

    def _bad_rows(self) -> tuple[list[RowId], list[RowId]]:
        bad = [
            row
            for batch, losses in self._pair_losses
            for row, finite in zip(batch.row_ids, torch.isfinite(losses).tolist(), strict=True)
            if not finite
        ]
        return bad, [row for batch in self._step_batches for row in batch.row_ids]

    def _backward_options(self) -> dict[str, Any]:
        if self.args.optim in ("lomo", "adalomo"):
            return {"learning_rate": self._get_learning_rate()}
        return {}

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate one worker's batches. The mean loss is accumulated as a metric and added by `log`."""
        step = inputs.to(self.args.device)
        # Here too: `eval_on_start` evaluates before the first step.
        self._check_packing()
        with torch.no_grad(), self.accelerator.autocast():
            whole = self._whole_batch(model, step) if self._needs_whole_batch(step) else None
            losses = [self._batch_loss(batch, self._forward(model, batch), step, whole) for batch in step.batches]
        return torch.stack(losses).sum(), None, None

    # Counters of transformers

    def floating_point_ops(self, inputs: WorkerStep) -> int:
        """Return the operations of forward and backward, without attention."""
        # Per weight and token 2 in the forward (multiply, add), and twice that in the backward.
        return 6 * inputs.fed_tokens * self._parameters

    @cached_property
    def _parameters(self) -> int:
        """Number of weights without embeddings: counted once, since walking through all modules takes part of a small step."""
        return self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: WorkerStep) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        seen = torch.tensor(inputs.fed_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(seen).sum())
