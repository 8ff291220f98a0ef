"""The trainer of prompts: the policy generates completions, reward functions score them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from strategies.checkpoints.generation import read_generation, write_generation
from strategies.dataset_rows import as_dataset, check_shape, first_row, is_prepared
from strategies.mixins import DistributedParallelMixin
from strategies.models.adapter_start import added_as_it_is
from strategies.trainers.base import PreferenceTrainer
from strategies.trainers.start import check_start
from strategies.types import BatchKind

__all__ = ["AxolotlGRPOTrainer"]

ENTROPY = "entropy_ctrl_state.json"
"""TRL's file of `use_adaptive_entropy` in a checkpoint."""
ROW = "row"
"""Column of a prepared row with the trainer's input as JSON."""


class AxolotlGRPOTrainer(PreferenceTrainer, GRPOTrainer, DistributedParallelMixin):
    """GRPO on raw or prepared prompts.

    Differs from TRL's trainer in what `PreferenceTrainer` adds, and in two things. A reference may be passed as a model; TRL
    loads one by the policy's name, which a policy in memory or from a GGUF file does not have. A resumed run continues at
    its prompt; TRL restarts the order of the first epoch.

    Args (beside `PreferenceTrainer`'s):
        ref_model: the reference; None uses TRL's (an adapter's reference is the policy without it, or a copy of
            the initial adapter).
    """

    batch_kind: ClassVar[BatchKind] = "prompt"

    def _init_trl(self, *, ref_model: Any = None, **kwargs: Any) -> None:
        config = kwargs["args"]
        beta, sync = config.beta, config.sync_ref_model
        if ref_model is not None:
            # With beta 0 TRL neither loads a reference nor copies an adapter as one.
            config.beta, config.sync_ref_model = 0.0, False
        try:
            with added_as_it_is(kwargs["model"]):
                # Past PreferenceTrainer, whose constructor has called this method.
                super(PreferenceTrainer, self).__init__(**kwargs)
        finally:
            config.beta, config.sync_ref_model = beta, sync
        if ref_model is not None:
            self.beta = beta
            self.ref_model = self._prepared_reference(ref_model)
            if sync:
                self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    def _prepared_reference(self, reference: Any) -> Any:
        """Prepare the reference as TRL does; draws no random numbers, so that the random state is the same as TRL's."""
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        head_in_fp32 = {"cast_lm_head_to_fp32": self.args.cast_lm_head_to_fp32}
        # At the temperature of sampling, as TRL scores the policy.
        add_fused_lm_head(reference, temperature=self.temperature, **head_in_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Generate; at the first step also check that the policy starts at its reference."""
        output = super()._generate_and_score_completions(inputs)
        if self._must_check_start and "ref_per_token_logps" in output:
            self._check_start(output)
            # Once: the step counter is still 0 when further completions of the first step are generated.
            self.starts_at_reference = False
        return output

    def _check_start(self, output: dict[str, Any]) -> None:
        ids, mask = (torch.cat([output[f"prompt_{of}"], output[f"completion_{of}"]], dim=1) for of in ("ids", "mask"))
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            size, length = self.args.per_device_train_batch_size, output["completion_ids"].shape[1]
            policy = self._get_per_token_logps_and_entropies(self.model, ids, mask, length, batch_size=size)[0]
        self.model.train(was_training)
        check_start(self, policy, output["ref_per_token_logps"], output["completion_mask"])

    # Rows

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Check the rows, and decode prepared ones; prompts are rendered and tokenised at generation."""
        name = f"{dataset_name}_dataset"
        rows = as_dataset(dataset, name)
        if is_prepared(first_row(rows), self.batch_kind):
            # Decoded on access: Arrow can't hold columns of mixed types.
            rows = rows.select_columns([ROW])
            streamed = isinstance(rows, IterableDataset)
            rows = rows.map(_decode, batched=True, remove_columns=[ROW]) if streamed else rows.with_transform(_decode)
        check_shape(first_row(rows), self.batch_kind, name)
        return rows

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        rows = dataset if dataset is not None else self.train_dataset
        needed = self.args.generation_batch_size // self.num_generations
        # TRL's RepeatSampler drops an incomplete generation batch: the epoch would have no step.
        if len(rows) < needed:
            raise ValueError(
                f"train_dataset: {len(rows)} prompts don't fill one generation batch, {self.args.generation_batch_size} "
                f"completions of {needed} prompts; give more rows, or make the batch smaller"
            )
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        """Resume at the prompt where the checkpoint was written.

        TRL's sampler draws the order of each epoch from one generator, and a count of forwards selects the part of the
        generation batch; both restart with the process. A checkpoint within a generation batch contains its completions; with
        a different number of workers they are generated again by the current policy.
        """
        epochs_started, batches = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        sampler = getattr(self, "_train_sampler", None)
        if sampler is not None and sampler.shuffle:
            for _ in range(epochs_started):
                # What RepeatSampler draws when an epoch begins.
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        # Within the epoch suffices: an epoch is a whole number of generation batches.
        self._step, self._buffered_inputs = batches, None
        if resume_from_checkpoint is not None:
            rank, workers, device = self.args.process_index, self.args.world_size, self.accelerator.device
            saved = read_generation(Path(resume_from_checkpoint), rank, workers, device)
            self._buffered_inputs = saved if saved and len(saved) == self.args.steps_per_generation else None
            if self.use_adaptive_entropy:
                self._load_entropy(Path(resume_from_checkpoint) / ENTROPY)
        return epochs_started, batches

    def _load_entropy(self, file: Path) -> None:
        # TRL loads it with the optimizer, by a method that is never given a checkpoint here.
        if file.is_file():  # a run that hadn't adapted it has none
            state = json.loads(file.read_text())
            self.entropy_coef, self._last_world_entropy = state["entropy_coef"], state["last_world_entropy"]

    def _save_rng_state(self, output_dir: str) -> None:
        # In this method since transformers calls it on every rank, each of which has its own completions.
        super()._save_rng_state(output_dir)
        is_within = self._step % (self.args.steps_per_generation * self.num_iterations) > 0
        if is_within and self._buffered_inputs is not None:
            write_generation(Path(output_dir), self.args.process_index, self.args.world_size, self._buffered_inputs)

    # Metrics

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Generate and grade completions, or take the next ones of the generation batch."""
        if self._mode != "train":
            return super()._prepare_inputs(inputs)
        with self.speed.clock.part("generation"):
            prepared = super()._prepare_inputs(inputs)
        ids = [prepared[name] for name in ("prompt_ids", "completion_ids")]
        # No work: most of the time goes into generating, which isn't one forward per token.
        self.speed.count(len(ids[0]), sum(part.numel() for part in ids))
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; `tokens_per_second` counts prompt and completion tokens once per generation.

        Metrics without any value (all NaN) are dropped; TRL would log None.
        """
        # TRL's GRPO trainer counts tokens in the state alone.
        self._total_train_tokens = self.state.num_input_tokens_seen
        kept = self._metrics[self._mode]
        for name in [name for name, values in kept.items() if all(map(math.isnan, values))]:
            del kept[name]
        super().log(logs, start_time)


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Decode a batch of prepared rows into columns; missing values are None."""
    rows = [json.loads(text) for text in batch[ROW]]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
