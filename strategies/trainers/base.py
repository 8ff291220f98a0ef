"""What every trainer of ours adds to TRL's: late or prepared rows, exact metrics, throughput, a model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from strategies.base import BatchKind
from strategies.ledger import Ledger
from strategies.metrics import MetricSums
from strategies.mixins import (
    AgreementMixin,
    CheckpointMixin,
    MetricsMixin,
    OptimizerInitMixin,
    OptimizerMixin,
    RngLoaderMixin,
    SchedulerMixin,
    SyncedReferenceMixin,
)
from strategies.reference import placeholder_reference
from strategies.rows import (
    REFERENCE_COLUMNS,
    as_dataset,
    check_shape,
    each_split,
    first_row,
    is_prepared,
    is_scored,
    placeholder_rows,
    select,
)
from strategies.saving import write_model_card

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(
    CheckpointMixin,
    AgreementMixin,
    RngLoaderMixin,
    SchedulerMixin,
    OptimizerMixin,
    OptimizerInitMixin,
    SyncedReferenceMixin,
    MetricsMixin,
    Trainer,
):
    """Stands before TRL's trainer in the order of bases: `class T(PreferenceTrainer, DPOTrainer, DistributedParallelMixin)`.

    Rows may be set after construction and may be prepared already; metrics are means over all that was seen since the
    last log, on all ranks, gathered in one collective per log; `tokens_per_second` is logged; a run phones nobody.

    Args (beside TRL's):
        rl: the strategy's name, for the model card and the model's tags; TRL's name of the trainer when not given.
        uses_reference: whether the loss compares the policy with a reference; without one none is loaded.
        cached_reference: whether the rows bring the reference's log-probabilities, so that no model is needed for them.
        dataset_tags: names of the data, for the model card and the model's tags.
        base_model: name of the model that training starts from, for the model card and the adapter's config.

    Attributes:
        notes: what a person should know of this trainer, such as that it can't do what was asked for.
        generations: the last table of answers, with `dpo_generate_during_eval`.
    """

    batch_kind: ClassVar[BatchKind]
    """What one row holds."""

    def __init__(
        self,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        rl: str | None = None,
        uses_reference: bool = True,
        cached_reference: bool = False,
        dataset_tags: Sequence[str] | None = None,
        base_model: str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.rl = rl or self._name.lower()
        self._tag_names = ["axolotl", self.rl]
        self.uses_reference = uses_reference
        self.cached_reference = cached_reference
        self.dataset_tags = list(dataset_tags or [])
        self.base_model = base_model
        self.identity = {"strategy": self.rl, **({"base model": base_model} if base_model is not None else {})}
        self.generations: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._start_metrics()
        self.ledger = Ledger()
        self._counts = True
        self._own_init(
            train_dataset=self._or_placeholder(train_dataset, "train_dataset"),
            eval_dataset=self._or_placeholder(eval_dataset, "eval_dataset"),
            callbacks=[self._step_timer, self.ledger, *(callbacks or [])],
            **kwargs,
        )
        if train_dataset is None:
            self._train_rows = None
        if eval_dataset is None:
            self._eval_rows = None
        if self.dataset_tags:
            self.model.add_model_tags(self.dataset_tags)
        if base_model is not None and isinstance(self.model, PeftModel):
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = base_model

    def _own_init(self, **kwargs: Any) -> None:
        """Construct TRL's trainer; a loss that needs no reference model gets none."""
        if self.uses_reference and not self.cached_reference:
            super().__init__(**kwargs)
            return
        # TRL loads a reference by the model's name where none is given, and copies an adapter that is continued.
        super().__init__(ref_model=placeholder_reference(), **kwargs)
        self.ref_model = None
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    # Rows

    def _or_placeholder(self, rows: Any, name: str) -> Any:
        return placeholder_rows(self.batch_kind) if rows is None else each_split(as_dataset, rows, name)

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
        name = f"{dataset_name}_dataset"
        rows = as_dataset(dataset, name)
        if is_prepared(first_row(rows), self.batch_kind):
            self._check_scores(first_row(rows), name)
            return select(rows, self.batch_kind)
        check_shape(first_row(rows), self.batch_kind, name)
        self._check_scores(first_row(rows), name)
        return select(self._tokenise(rows, processing_class, args, dataset_name), self.batch_kind)

    def _check_scores(self, row: Any, name: str) -> None:
        has = is_scored(row, name)
        if self.cached_reference and not has:
            raise ValueError(
                f"reference: cached, but the rows of {name} have no {' and '.join(REFERENCE_COLUMNS)}; "
                "score them (prefray score), or write reference: live"
            )

    def _tokenise(self, rows: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Raw rows with ids: TRL's own preparation."""
        return super()._prepare_dataset(rows, processing_class, args, dataset_name)

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
        elif self.args.metric_for_best_model is not None:
            self._check_selection(self.args.metric_for_best_model)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _stop_evaluating(self) -> None:
        if self.args.metric_for_best_model is not None:
            raise ValueError(
                "eval_dataset: choosing the best checkpoint and stopping early need rows to evaluate on; "
                "set trainer.eval_dataset, or remove load_best_model_at_end and early_stopping_patience"
            )
        self.args.eval_strategy = "no"
        self.args.eval_on_start = False

    def _check_selection(self, metric: str) -> None:
        """Refuse a metric that no evaluation will have, before the first step."""
        if isinstance(self.eval_dataset, dict) and not metric.startswith(tuple(f"eval_{name}_" for name in self.eval_dataset)):
            example = f"eval_{next(iter(self.eval_dataset))}_{metric.removeprefix('eval_')}"
            raise ValueError(
                f"metric_for_best_model: {metric} is the metric of one evaluation set, and there are "
                f"{len(self.eval_dataset)}; name one of them, such as {example}"
            )

    def _finish_loss(
        self, model: Any, inputs: dict[str, Any], loss: torch.Tensor, outputs: Any, sums: MetricSums, return_outputs: bool
    ) -> Any:
        """What every loss ends with: the auxiliary loss of mixtures of experts, the records, the logits if wanted."""
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            sums["aux_loss"] = (outputs.aux_loss.detach(), torch.ones_like(outputs.aux_loss))
        self._record(sums, inputs["attention_mask"].sum(), self._counts)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    # Evaluation

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate a batch without the rows that accelerate repeats to fill the last forward of all workers."""
        if self.batch_kind == "prompt":
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = len(inputs["input_ids"])
        real = self._real_rows(rows)
        # A worker without a row of its own goes through the motions with one that doesn't count.
        self._counts = real > 0
        inputs = {name: values[: max(real, 1)] for name, values in inputs.items()}
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._counts = True

    def _real_rows(self, rows: int) -> int:
        """How many of this worker's rows in the batch at hand are no repetitions."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.args.process_index * rows, 0), rows)

    # Card

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our model card beside the checkpoints, in place of TRL's."""
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    def _send_telemetry(self) -> None:
        """A training run phones nobody."""
