"""Base of all trainers. Adds to TRL's: late or prepared rows, exact metrics, throughput, a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.data_utils import is_conversational

from strategies.batch.row_ledger import Ledger
from strategies.compat import tokenizer_of
from strategies.dataset_rows import (
    REFERENCE_COLUMNS,
    as_dataset,
    check_shape,
    checked_rows,
    each_split,
    first_row,
    is_prepared,
    is_scored,
    placeholder_rows,
    select,
)
from strategies.inference.eval_generations import EvalGenerations
from strategies.inference.reference import placeholder_reference
from strategies.media import PICTURES
from strategies.metrics import MetricSums
from strategies.mixins import (
    AgreementMixin,
    CheckpointMixin,
    EndingMixin,
    MetricsMixin,
    OptimizerInitMixin,
    OptimizerMixin,
    RngLoaderMixin,
    SchedulerMixin,
    SyncedReferenceMixin,
)
from strategies.mixins.checkpoint import CheckpointStorage
from strategies.models.adapter_start import added_as_it_is
from strategies.models.saving import write_model_card
from strategies.types import BatchKind
from strategies.vision.features import first_rows
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import with_pictures

__all__ = ["PreferenceTrainer"]


NO_END = "answers of plain text get no end token where a processor is given, as in TRL; write it at their ends"


class PreferenceTrainer(
    CheckpointMixin,
    EndingMixin,
    AgreementMixin,
    RngLoaderMixin,
    SchedulerMixin,
    OptimizerMixin,
    OptimizerInitMixin,
    SyncedReferenceMixin,
    MetricsMixin,
    Trainer,
):
    """Precedes TRL's trainer among the bases: `class T(PreferenceTrainer, DPOTrainer, DistributedParallelMixin)`.

    Rows may be set after construction and may be prepared; metrics are means over all rows since the last log, on all
    ranks, gathered in one collective per log; `tokens_per_second` is logged; no telemetry is sent.

    Args (beside TRL's):
        rl: the strategy's name, for the model card and the model's tags; TRL's name of the trainer when not given.
        uses_reference: whether the loss compares the policy with a reference; if not, none is loaded.
        cached_reference: whether the rows contain the reference's log-probabilities, so that no reference model is needed.
        dataset_tags: names of the data, for the model card and the model's tags.
        base_model: name of the model that training starts from, for the model card and the adapter's config.
        identity: further names that identify this run's checkpoints; others are refused.
        checkpoint_storage: where checkpoints are stored, if not in the output folder.
        starts_at_reference: whether the reference is the policy before its first step, which is checked at that step.
        generates_answers: whether evaluations generate answers of policy and reference.

    Attributes:
        notes: messages for the user, for example that a requested feature is not available.
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
        identity: Mapping[str, str] | None = None,
        checkpoint_storage: CheckpointStorage | None = None,
        starts_at_reference: bool = False,
        generates_answers: bool = False,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        self.rl = rl or self._name.lower()
        # Before TRL's constructor, which tags the model with them.
        self._tag_names = ["axolotl", self.rl]
        self.uses_reference = uses_reference
        self.cached_reference = cached_reference
        self.dataset_tags = list(dataset_tags or [])
        self.base_model = base_model
        names = {"strategy": self.rl, "base model": base_model, **(identity or {})}
        self.identity = {name: value for name, value in names.items() if value is not None}
        self.checkpoint_storage = checkpoint_storage
        self.starts_at_reference = starts_at_reference
        self.generations: list[dict[str, Any]] = []
        self.notes: list[str] = []
        processor = kwargs.get("processing_class")
        takes_pictures = isinstance(processor, ProcessorMixin) and self.batch_kind != "prompt"
        self.vision = VisionProcessing(processor) if takes_pictures else None
        # Before TRL's constructor too: it assigns the rows, and their setters read both.
        self.eval_generations: EvalGenerations | None = None
        self._start_metrics()
        self.ledger = Ledger()
        self._is_real = True
        self._init_trl(
            train_dataset=self._for_trl(train_dataset, "train_dataset"),
            eval_dataset=self._for_trl(eval_dataset, "eval_dataset"),
            callbacks=[self.speed.clock, self.ledger, *(callbacks or [])],
            **kwargs,
        )
        self.eval_generations = EvalGenerations(self) if generates_answers else None
        # TRL was given placeholders for these rows (`_for_trl`).
        if train_dataset is None or self.vision is not None:
            self.train_dataset = train_dataset
        if eval_dataset is None or self.vision is not None:
            self.eval_dataset = eval_dataset
        if self.dataset_tags:
            self.model.add_model_tags(self.dataset_tags)
        if base_model is not None and isinstance(self.model, PeftModel):
            # An adapter is loaded onto what this names; PEFT has written the model's own name, which may be a local path.
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = base_model
            # Of the card that PEFT writes beside each checkpoint.
            self.model.get_base_model().config.name_or_path = base_model

    def _init_trl(self, **kwargs: Any) -> None:
        """Construct TRL's trainer, without a reference model if none is needed."""
        with added_as_it_is(kwargs["model"]):
            if self.uses_reference and not self.cached_reference:
                super().__init__(**kwargs)
                return
            # Without `ref_model` TRL would load a reference by the model's name, and copy an adapter that is continued.
            super().__init__(ref_model=placeholder_reference(), **kwargs)
        self.ref_model = None
        # A model that another trainer has trained may still have that one's reference.
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    # Rows

    @property
    def text_tokenizer(self) -> Any:
        """The tokenizer, also where there is a processor."""
        return tokenizer_of(self)

    def _for_trl(self, rows: Any, name: str) -> Any:
        """Return the rows that TRL's constructor prepares; it would leave rows with pictures to a collator of its own."""
        if rows is None or self.vision is not None:
            return placeholder_rows(self.batch_kind)
        return each_split(self._checked, rows, name)

    def _checked(self, rows: Any, name: str) -> Any:
        return checked_rows(rows, name, PICTURES if self.vision is not None else ())

    @property
    def train_dataset(self) -> Any:
        """Prepared training rows, None until set. Raw rows are tokenised when they are assigned."""
        return self._train_rows

    @train_dataset.setter
    def train_dataset(self, rows: Any) -> None:
        self._train_rows = None if rows is None else self._prepare_split(rows, "train")

    @property
    def eval_dataset(self) -> Any:
        """Prepared evaluation rows, or a dict of them by name; None until set."""
        return self._eval_rows

    @eval_dataset.setter
    def eval_dataset(self, rows: Any) -> None:
        self._eval_rows = None if rows is None else each_split(self._prepare_split, rows, "eval")

    def _prepare_split(self, rows: Any, name: str) -> Any:
        return self._prepare_dataset(self._checked(rows, f"{name}_dataset"), self.text_tokenizer, self.args, name)

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
        """Tokenise raw rows by TRL's own preparation, or by the processor where there is one."""
        if self.vision is not None:
            if not is_conversational(first_row(rows)):
                self.notes.append(f"{dataset_name}_dataset: {NO_END}")
            return with_pictures(rows, self.vision, f"{dataset_name}_dataset")
        return super()._prepare_dataset(rows, processing_class, args, dataset_name)

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or resume from a checkpoint folder.

        Raises:
            ValueError: without training rows, or without evaluation rows where selecting the best checkpoint needs them.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset: nothing to train on; set trainer.train_dataset before trainer.train()")
        if self.eval_dataset is None:
            self._stop_evaluating()
        elif self.args.metric_for_best_model is not None:
            self._check_selection(self.args.metric_for_best_model)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def _must_check_start(self) -> bool:
        return self.starts_at_reference and self.state.global_step == 0

    def _stop_evaluating(self) -> None:
        if self.args.metric_for_best_model is not None:
            raise ValueError(
                "eval_dataset: choosing the best checkpoint and stopping early need rows to evaluate on; "
                "set trainer.eval_dataset, or remove load_best_model_at_end and early_stopping_patience"
            )
        # TRL's constructor was given a placeholder: without this the first evaluation would fail.
        self.args.eval_strategy = "no"
        self.args.eval_on_start = False

    def _check_selection(self, metric: str) -> None:
        """Raise before the first step if no evaluation reports the selected metric."""
        if isinstance(self.eval_dataset, dict) and not metric.startswith(tuple(f"eval_{name}_" for name in self.eval_dataset)):
            example = f"eval_{next(iter(self.eval_dataset))}_{metric.removeprefix('eval_')}"
            raise ValueError(
                f"metric_for_best_model: {metric} is the metric of one evaluation set, and there are "
                f"{len(self.eval_dataset)}; name one of them, such as {example}"
            )

    def _finish_loss(
        self, model: Any, inputs: dict[str, Any], loss: torch.Tensor, outputs: Any, sums: MetricSums, return_outputs: bool
    ) -> Any:
        """Add the router loss of mixtures of experts, record metrics, and run a forward for logits if they are requested."""
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            sums["aux_loss"] = (outputs.aux_loss.detach(), torch.ones_like(outputs.aux_loss))
        self._record(sums, inputs["attention_mask"].sum(), self._is_real)
        if not return_outputs:
            return loss
        # Again, since the fused head has made no logits.
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, then release weights that ZeRO-3 prefetched for a backward pass, with which saving would fail."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.is_deepspeed_enabled:
            self.model_wrapped.empty_partition_cache()
        return output

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Evaluate a batch without the rows that accelerate repeats to fill the last forward of all workers."""
        if self.batch_kind == "prompt":
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = len(inputs["input_ids"])
        real = self._real_rows(rows)
        # A worker without real rows runs a repeated one, since collectives need every rank, but records nothing.
        self._is_real = real > 0
        try:
            return super().prediction_step(
                model, first_rows(inputs, max(real, 1), self.vision), prediction_loss_only, ignore_keys
            )
        finally:
            self._is_real = True

    def _real_rows(self, rows: int) -> int:
        """Return how many of this worker's rows in the current batch are not repetitions."""
        state = self.accelerator.gradient_state
        # accelerate's remainder is -1 where the length is unknown, and 0 where the last batch is full.
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        # Rows of a global batch lie rank after rank, and the repeated ones at its end.
        return min(max(state.remainder - self.args.process_index * rows, 0), rows)

    # Card

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write our model card beside the checkpoints, instead of TRL's."""
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    def _send_telemetry(self) -> None:
        """Send nothing; TRL's trainer reports its use."""
