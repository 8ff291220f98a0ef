"""The trainer of `rl: dpo`: TRL's, with our mixins, our rows, and losses that are functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer

from strategies.callbacks import StepTimer
from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps
from strategies.mixins import (
    DistributedParallelMixin,
    OptimizerInitMixin,
    OptimizerMixin,
    RngLoaderMixin,
    SchedulerMixin,
)
from strategies.pair_step import gather_means, pair_logps, pair_sums, wpo_weights
from strategies.reference import reference_forward
from strategies.rows import as_dataset, each_split, first_row, is_prepared, placeholder_rows, select_prepared
from strategies.saving import write_model_card

__all__ = ["AxolotlDPOTrainer"]

NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}


class AxolotlDPOTrainer(
    RngLoaderMixin, SchedulerMixin, OptimizerMixin, OptimizerInitMixin, DPOTrainer, DistributedParallelMixin
):
    """DPO on raw or prepared pairs.

    Differs from TRL's trainer in this: rows may be set after construction and may be prepared already; the losses in
    `PAIR_LOSSES` are computed here (with label smoothing for `sigmoid`), all others by TRL; the metrics of a step are
    gathered in one collective; `tokens_per_second` is logged; nothing is reported to the makers of TRL.

    Args (beside TRL's):
        dataset_tags: names of the data, for the model card and the model's tags.
        base_model: name of the model that training starts from, for the model card and the adapter's config.
    """

    _tag_names: ClassVar[list[str]] = ["axolotl", "dpo"]

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        dataset_tags: Sequence[str] | None = None,
        base_model: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.dataset_tags = list(dataset_tags or [])
        self.base_model = base_model
        self.generations: list[dict[str, Any]] = []
        self._step_timer = StepTimer()
        late = placeholder_rows(token_id=0)
        super().__init__(
            *args,
            train_dataset=late if train_dataset is None else as_dataset(train_dataset, "train_dataset"),
            eval_dataset=late if eval_dataset is None else each_split(as_dataset, eval_dataset, "eval_dataset"),
            callbacks=[self._step_timer, *(callbacks or [])],
            **kwargs,
        )
        if train_dataset is None:
            self._train_rows = None
        if eval_dataset is None:
            self._eval_rows = None
        self._tokens_at_last_log = 0
        if self.dataset_tags:
            self.model.add_model_tags(self.dataset_tags)
        if base_model is not None and isinstance(self.model, PeftModel):
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = base_model

    # Rows

    @property
    def train_dataset(self) -> Any:
        """Prepared training rows, None until they are set. Raw rows that are assigned are tokenised at once."""
        return self._train_rows

    @train_dataset.setter
    def train_dataset(self, rows: Any) -> None:
        self._train_rows = None if rows is None else self._prepare_split(rows, "train")

    @property
    def eval_dataset(self) -> Any:
        """Prepared evaluation rows, or a dict of them by name; None until they are set."""
        return self._eval_rows

    @eval_dataset.setter
    def eval_dataset(self, rows: Any) -> None:
        self._eval_rows = None if rows is None else each_split(self._prepare_split, rows, "eval")

    def _prepare_split(self, rows: Any, name: str) -> Any:
        return self._prepare_dataset(rows, self._tokenizer, self.args, name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        rows = as_dataset(dataset, f"{dataset_name}_dataset")
        if is_prepared(first_row(rows)):
            return select_prepared(rows)
        return select_prepared(super()._prepare_dataset(rows, processing_class, args, dataset_name))

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; with a checkpoint folder, from where it was written on.

        Raises:
            ValueError: without rows to train on, or to evaluate on where choosing the best checkpoint needs them.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: nothing to train on; set trainer.train_dataset before trainer.train()")
        if self.eval_dataset is None:
            self._stop_evaluating()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _stop_evaluating(self) -> None:
        if self.args.metric_for_best_model is not None:
            raise ValueError(
                "eval_dataset: choosing the best checkpoint and stopping early need rows to evaluate on; "
                "set trainer.eval_dataset, or remove load_best_model_at_end and early_stopping_patience"
            )
        self.args.eval_strategy = "no"
        self.args.eval_on_start = False

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs or not all(loss in PAIR_LOSSES for loss in self.loss_types):
            return super()._compute_loss(model, inputs, return_outputs)
        mask = inputs["completion_mask"][:, 1:]
        arguments = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        arguments["labels"] = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**arguments, **router, use_cache=False, fused_lm_head=True)
        policy = self._pair_logps(outputs.log_probs, mask)
        reference = self._reference_logps(inputs, arguments, mask)
        weights = wpo_weights(outputs, mask) if self.use_weighting else 1.0
        options = LossOptions(beta=self.beta, label_smoothing=self.label_smoothing)
        loss = sum(
            weight * (weights * PAIR_LOSSES[name](policy, reference, options)).mean()
            for name, weight in zip(self.loss_types, self.loss_weights, strict=True)
        )
        sums = pair_sums(outputs, mask, policy, reference, self.beta)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            sums["aux_loss"] = (outputs.aux_loss.detach(), torch.ones_like(outputs.aux_loss))
        self._record(sums, inputs["attention_mask"].sum())
        return loss

    def _pair_logps(self, per_token_logps: torch.Tensor, mask: torch.Tensor) -> PairLogps:
        return pair_logps(per_token_logps, mask, mask.sum(dim=1), self.ld_alpha)

    def _reference_logps(self, inputs: dict[str, Any], arguments: dict[str, Any], mask: torch.Tensor) -> PairLogps:
        if "ref_chosen_logps" in inputs:
            lengths = mask.sum(dim=1).chunk(2)
            return PairLogps(inputs["ref_chosen_logps"], inputs["ref_rejected_logps"], *lengths)
        return self._pair_logps(reference_forward(self, arguments), mask)

    # Metrics

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on counting tokens where the checkpoint's log left off; TRL starts again at 0."""
        found = super()._init_training_state(*args, **kwargs)
        counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        self._total_train_tokens = self._tokens_at_last_log = int(counts[-1]) if counts else 0
        return found

    def _record(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor]], tokens: torch.Tensor) -> None:
        """Keep the means over all ranks for the next log."""
        mode = "train" if self.model.training else "eval"
        means, all_tokens = gather_means(self.accelerator, sums, tokens)
        for name, mean in means.items():
            self._metrics[mode][name].append(mean)
        if mode == "train":
            self._total_train_tokens += all_tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with `tokens_per_second`: tokens fed since the last log, by all workers, per second spent in steps."""
        if "loss" in logs:
            seconds, tokens = self._step_timer.take(), self._total_train_tokens - self._tokens_at_last_log
            self._tokens_at_last_log = self._total_train_tokens
            if seconds > 0:
                logs["tokens_per_second"] = tokens / seconds
        super().log(logs, start_time)

    # Card

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our model card beside the checkpoints, in place of TRL's."""
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    def _send_telemetry(self) -> None:
        """A training run phones nobody."""
