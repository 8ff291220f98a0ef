"""Training and evaluating by the batch plan: one item of the data loader is one worker's share of a global batch."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType

from strategies.batching import BatchPlan, packed_tokens
from strategies.ledger import RowId
from strategies.packing.support import prepare_packing, why_not_packed
from strategies.pair_batch import PairBatch, PairCollator, StepShare
from strategies.sharding import accumulate_outside
from strategies.step_loader import ForwardLimits, StepLoader, check_scores, pair_lengths, too_long
from strategies.trainers.base import PreferenceTrainer

__all__ = ["PlannedTrainer"]

logger = logging.getLogger(__name__)

EVALUATED_TOGETHER = 32
"""Pairs per worker that an evaluation shares out at once, so that packed rows are full."""


class PlannedTrainer(PreferenceTrainer):
    """Trains on global batches that depend on nothing but seed, epoch, step and size.

    Each worker runs its share of a global batch in forwards of at most `tokens_per_forward` tokens (packed) or
    `per_device_train_batch_size` pairs (padded), one backward pass per forward, and gradients are exchanged in the last.
    Every pair weighs one over the size of the global batch.

    Attributes:
        global_batch_size: pairs of an optimizer step, over all workers.
        packed: whether batches are packed rows.
        padded_because: why they are padded although packed rows were asked for; None where they are packed.
    """

    def _own_init(self, **kwargs: Any) -> None:
        self._fed: list[PairBatch] = []
        self._pair_losses: list[tuple[PairBatch, torch.Tensor]] = []
        # The plan accumulates; transformers' loop sees one batch per step.
        args = copy.copy(kwargs["args"])
        made = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.global_batch_size = args.global_batch_size or made
        args.gradient_accumulation_steps = 1
        accumulate_outside(args)
        super()._own_init(**{**kwargs, "args": args})
        self.padded_because = self._why_not_packed() if args.sample_packing else None
        self.packed = args.sample_packing and self.padded_because is None
        if self.packed:
            for model in self._models():
                prepare_packing(model)
        elif args.sample_packing:
            size = args.per_device_train_batch_size
            self.notes.append(f"batches are padded, {size} pairs a forward, not packed: {self.padded_because}")
            logger.warning(self.notes[-1])

    def _models(self) -> list[Any]:
        """The policy, and a reference beside it."""
        models = [self.model, getattr(self, "ref_model", None)]
        return [self.accelerator.unwrap_model(model) for model in models if model is not None]

    def _why_not_packed(self) -> str | None:
        longest = self.args.max_length if self.args.max_length is not None else sys.maxsize
        reasons = (why_not_packed(model, longest) for model in self._models())
        return next((reason for reason in reasons if reason is not None), None)

    # Batches

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of an optimizer step, over all workers."""
        return self.global_batch_size

    def get_train_dataloader(self) -> StepLoader:
        """The steps of an epoch."""
        args, rows = self.args, self.train_dataset
        if not hasattr(rows, "__len__"):
            raise ValueError("train_dataset: rows are shuffled as a whole; give a datasets.Dataset or a list, no stream")
        seed = args.data_seed if args.data_seed is not None else args.seed
        plan = BatchPlan(len(rows), self.global_batch_size, seed, args.dataloader_drop_last)
        return self._loader(rows, plan, args.per_device_train_batch_size, "train_dataset")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """Global batches of the rows in their order."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("eval_dataset: nothing to evaluate on; set trainer.eval_dataset, or hand rows to evaluate()")
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return self._evaluation_loader(rows)

    def get_test_dataloader(self, test_dataset: Any) -> StepLoader:
        """As `get_eval_dataloader`."""
        return self._evaluation_loader(test_dataset)

    def _evaluation_loader(self, rows: Any) -> StepLoader:
        rows = self._prepare_split(rows, "eval")
        each = self.args.per_device_eval_batch_size
        # A loss that couples pairs is that of global batches, as in training.
        together = self.global_batch_size if self._couples else max(each, EVALUATED_TOGETHER) * self.args.world_size
        plan = BatchPlan(len(rows), together, seed=None)
        return self._loader(rows, plan, each, "eval_dataset")

    def _loader(self, rows: Any, plan: BatchPlan, most_rows: int, name: str) -> StepLoader:
        args = self.args
        lengths = pair_lengths(rows)
        check_scores(rows, lengths, name)
        tokens = packed_tokens(lengths, args.max_length, args.truncation_mode)
        limits = ForwardLimits(args.world_size, args.process_index, self._budget(tokens, name), most_rows)
        padding = self.data_collator
        if self.packed:
            limits, padding = ForwardLimits(limits.world_size, limits.rank, limits.budget, None), None
        collate = PairCollator(
            args.max_length, args.truncation_mode, padding, args.pad_to_multiple_of, self._tokenizer.pad_token_id or 0
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
        """Tokens of a forward; padded ones are limited by their rows."""
        if not self.packed:
            return sys.maxsize
        args = self.args
        budget = args.tokens_per_forward
        if budget is None:
            budget = 2 * args.max_length if args.max_length is not None else int(tokens.max())
        multiple = args.pad_to_multiple_of or 1
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

    def _whole_batch(self, model: Any, share: StepShare) -> Any:
        """What a loss that couples pairs needs to know of the global batch."""
        raise NotImplementedError

    def _batch_loss(self, model: Any, batch: PairBatch, share: StepShare, whole: Any) -> torch.Tensor:
        """The part of a forward in the loss of the global batch; the parts of all forwards and workers add up to it."""
        raise NotImplementedError

    def _is_divided(self, share: StepShare) -> bool:
        """Whether a forward needs to know of pairs that it doesn't have."""
        return self._couples and (len(share.batches) > 1 or self.args.world_size > 1)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The share of the next step."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: StepShare, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward through the share; the mean of the results over workers is the loss of the global batch."""
        model.train()
        if (schedule_free := getattr(self.optimizer, "train", None)) is not None:
            schedule_free()
        share = inputs.to(self.args.device)
        whole = self._whole_batch(model, share) if self._is_divided(share) else None
        # transformers' averages, of gradients and of losses, are over workers.
        scale = self.args.world_size
        total = torch.zeros((), device=self.args.device)
        self._pair_losses = []
        self._fed = [batch for batch in share.batches if batch.counts]
        self.ledger.feed(row for batch in self._fed for row in batch.row_ids)
        for number, batch in enumerate(share.batches, start=1):
            with self._exchange(model, now=number == len(share.batches)):
                with self.accelerator.autocast():
                    loss = scale * self._batch_loss(model, batch, share, whole)
                total += loss.detach()
                if self._steps_in_backward and self._refuse(loss):
                    self._forget_gradients(model)
                    break
                self.accelerator.backward(loss, **self._backward_options())
        self._step_losses.append(total)
        self._empty_cache()
        return total

    def _exchange(self, model: Any, now: bool) -> AbstractContextManager[Any]:
        """Exchange gradients in this backward pass, or only add them up."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return self._stepping(now)
        return nullcontext() if now else self.accelerator.no_sync(model)

    @contextmanager
    def _stepping(self, now: bool) -> Iterator[None]:
        """DeepSpeed's optimizer steps at the end of a backward pass of which accelerate says that it exchanges gradients."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(now)
        try:
            yield
        finally:
            state._set_sync_gradients(True)

    def _forget_gradients(self, model: Any) -> None:
        """Drop what the forwards before have added up; of what DeepSpeed holds, `zero_grad` leaves a part."""
        model.zero_grad()
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            model.optimizer.zero_grad()
            for name in ("averaged_gradients", "all_grad_tensors"):
                held = getattr(model.optimizer, name, {})
                held.update(dict.fromkeys(held))

    def _watch(self, batch: PairBatch, per_pair: torch.Tensor) -> None:
        """Remember the loss of each pair, shape (B,), until the step is decided on."""
        if batch.counts and self._mode == "train":
            self._pair_losses.append((batch, per_pair.detach()))

    def _suspects(self) -> tuple[list[RowId], list[RowId]]:
        faulty = [
            row
            for batch, losses in self._pair_losses
            for row, finite in zip(batch.row_ids, torch.isfinite(losses).tolist(), strict=True)
            if not finite
        ]
        return faulty, [row for batch in self._fed for row in batch.row_ids]

    def _backward_options(self) -> dict[str, Any]:
        if self.args.optim in ("lomo", "adalomo"):
            return {"learning_rate": self._get_learning_rate()}
        return {}

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0 and torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate a share; the loss of all pairs is a metric like the others, and `log` puts it in."""
        share = inputs.to(self.args.device)
        with torch.no_grad(), self.accelerator.autocast():
            whole = self._whole_batch(model, share) if self._is_divided(share) else None
            losses = [self._batch_loss(model, batch, share, whole) for batch in share.batches]
        return torch.stack(losses).sum(), None, None

    # What transformers counts of a batch

    def floating_point_ops(self, inputs: StepShare) -> int:
        """Of forward and backward, attention left out."""
        return 6 * inputs.fed_tokens * self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: StepShare) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        seen = torch.tensor(inputs.fed_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(seen).sum())
