"""The trainer of labelled completions."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Value
from numpy.typing import NDArray
from trl import KTOTrainer

from strategies.batch.kto_sampler import MismatchedRows, MismatchedSampler, number_prompts
from strategies.batch.loader import check_pictures, check_positions, check_tokens_of_pictures, each_ids, row_lengths
from strategies.dataset_rows import as_dataset, have_pictures
from strategies.inference.reference import reference_forward
from strategies.losses.kto import kl_estimate, kto_loss
from strategies.media import PICTURES as PICTURE_COLUMNS
from strategies.metrics import MetricSums
from strategies.mixins import DistributedParallelMixin
from strategies.models.work import Tokens, triangle
from strategies.trainers.base import PreferenceTrainer
from strategies.trainers.start import check_start
from strategies.types import BatchKind
from strategies.vision.features import PICTURES, PictureCollator, run_padded
from strategies.vision.images import picture_key

__all__ = ["AxolotlKTOTrainer"]

KL = "kl"
"""Key of a batch that holds the KL term of its optimizer step."""


class AxolotlKTOTrainer(PreferenceTrainer, KTOTrainer, DistributedParallelMixin):
    """KTO on raw or prepared labelled completions.

    Differs from TRL's trainer in what `PreferenceTrainer` adds, and in the KL term, which pairs each prompt with the
    completion of another prompt. TRL fixes the pairing by the order of the data set, in blocks of the micro batch, so it
    can't shuffle, and estimates one KL per forward. Here rows are shuffled every epoch, the completion comes from the previous
    row of the global batch, and there is one KL per optimizer step, independent of how the global batch is cut into workers
    and forwards. An evaluation estimates one KL per forward of all workers, with a fixed partner for each row.
    """

    batch_kind: ClassVar[BatchKind] = "unpaired"
    data_collator: Any

    def _init_trl(self, **kwargs: Any) -> None:
        config = kwargs["args"]
        # With the loss that has no KL term, TRL changes neither the order nor the rows.
        wanted, config.loss_type = config.loss_type, "apo_zero_unpaired"
        try:
            super()._init_trl(**kwargs)
        finally:
            config.loss_type = wanted
        # TRL's constructor has copied the other one.
        self.loss_type = wanted

    # Rows

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        rows = as_dataset(dataset, f"{dataset_name}_dataset")
        if isinstance(rows, Dataset) and "label" in rows.column_names:
            invalid = {
                label if isinstance(label, str) else repr(label) for label in rows.unique("label") if label not in (0, 1)
            }
            if invalid:
                raise ValueError(
                    f"{dataset_name}_dataset: label must be true or false (or 1 or 0) in every row, "
                    f"got {', '.join(sorted(invalid)[:3])}"
                )
            if rows.features["label"] != Value("bool"):  # casting copies the table
                rows = rows.cast_column("label", Value("bool"))
        return super()._prepare_dataset(rows, processing_class, args, dataset_name)

    def _check_selection(self, metric: str) -> None:
        super()._check_selection(metric)
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        names = [name for name in sets if metric.startswith(f"eval_{name}_" if name else "eval_")]
        # The longest name: `news` begins the metrics of `news_long` too.
        rows: Any = sets[max(names, key=len)] if names else None
        # With one kind alone the other has no mean reward, and there is no margin.
        kinds = set(rows["label"]) if isinstance(rows, Dataset) else {True, False}
        if len(kinds) == 1 and metric.endswith(("/margins", "/rejected" if True in kinds else "/chosen")):
            raise ValueError(
                f"metric_for_best_model: {metric} needs rows with a true and rows with a false label to evaluate on, and "
                f"all {len(rows)} are {str(kinds.pop()).lower()}; give more rows (val_set_size), or choose eval_loss"
            )

    # Batches

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(dataset, "__len__"):
            raise ValueError("train_dataset: kto shuffles whole data sets; give a datasets.Dataset or a list, no stream")
        if len(dataset) < 2:
            raise ValueError("kto compares each row with the completion of another one, and there is one row; give more rows")
        lengths = row_lengths(dataset, ("prompt_ids", "completion_ids"))
        config = self.accelerator.unwrap_model(self.model).config
        name = str(kwargs.get("description", "training")).lower() + " rows"
        check_positions(lengths, config, self.args.max_length, name)
        if self.vision is not None:
            check_tokens_of_pictures(dataset, self.vision.image_token, name)
        text: Any = self.data_collator
        if self.vision is not None and have_pictures(dataset):
            check_pictures(dataset, lengths, self.args.max_length, True, self.vision.image_token, name)
            # For this loader only: other rows may have no pictures.
            self.data_collator = PictureCollator(text, self.vision)
        try:
            return super()._get_dataloader(MismatchedRows(dataset), *args, **kwargs)
        finally:
            self.data_collator = text

    def _get_train_sampler(self, train_dataset: Any = None) -> MismatchedSampler:
        args = self.args
        block = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return MismatchedSampler(len(train_dataset), block, args.seed, self._prompts_of(train_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> MismatchedSampler:
        block = self.args.per_device_eval_batch_size * self.args.world_size
        return MismatchedSampler(len(eval_dataset), block, None, self._prompts_of(eval_dataset))

    def _prompts_of(self, dataset: Any) -> NDArray[np.int64]:
        """Return the prompt id of each row, as `number_prompts`."""
        rows, pictures = dataset.rows, []
        if isinstance(rows, Dataset) and (columns := [name for name in PICTURE_COLUMNS if name in rows.column_names]):
            # As Arrow, since `datasets` would decode every picture.
            tables = rows.select_columns(columns).with_format("arrow").iter(100)
            pictures = [picture_key(row) for table in tables for row in table.to_pylist()]
        return number_prompts(each_ids(rows, "prompt_ids"), pictures)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Take the batches of one optimizer step; its KL term is estimated over all of them."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_batches, self._kl = batches, None
        return batches, number

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a forward and backward; the first of an optimizer step estimates the KL term over its batches on all ranks.

        Not in `get_batch_samples`: a resumed run restores its random state, which dropout uses, only after it.
        """
        if self._kl is None:
            batches = [self._prepare_inputs(batch) for batch in self._step_batches]
            if self._must_check_start:
                self._check_start(model, batches[0])
            # The KL term's forwards come before `super().training_step`, which sets these.
            model.train()
            if (schedule_free := getattr(self.optimizer, "train", None)) is not None:
                schedule_free()
            self._kl = self._estimate_kl(model, batches)
        return super().training_step(model, {**inputs, KL: self._kl}, num_items_in_batch)

    def _check_start(self, model: Any, batch: dict[str, torch.Tensor]) -> None:
        run = partial(_run, batch=batch)
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            check_start(self, run(model).log_probs, reference_forward(self, run), batch["completion_mask"][:, 1:])

    def _estimate_kl(self, model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Estimate the KL term over the batches of all ranks: a scalar without gradient."""
        logps = torch.cat([self._mismatched_logps(model, batch) for batch in batches])
        # Sums and counts, since workers may have different numbers of rows in an evaluation's last batch.
        local = torch.cat([logps.sum(dim=0), logps.new_tensor([len(logps)])]) * self._is_real
        *sums, count = self.accelerator.gather(local.unsqueeze(0)).sum(dim=0).unbind()
        policy, reference = torch.stack(sums) / count
        return kl_estimate(policy, reference)

    def _mismatched_logps(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log-probabilities of the mismatched completions under policy and reference, shape (B, 2), no gradient."""
        run = partial(_run, batch=batch, prefix="KL_")
        with torch.no_grad():
            policy = run(model).log_probs
        return torch.stack([policy.sum(dim=1), reference_forward(self, run).sum(dim=1)], dim=1)

    # Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        kl = inputs[KL] if KL in inputs else self._estimate_kl(model, [inputs])
        router: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = _run(model, inputs, **router)
        reference = reference_forward(self, partial(_run, batch=inputs)).sum(dim=1)
        policy = outputs.log_probs.sum(dim=1)
        if self._mode == "train":
            count = _tokens(inputs) + _tokens(inputs, "KL_") + _tokens(inputs, "KL_")
            self.speed.count(len(policy), inputs["input_ids"].numel(), _tokens(inputs), forwards=count)
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        loss = kto_loss(policy, reference, inputs["label"], kl, self.beta, **weights).mean()
        sums = _sums(outputs, inputs, policy.detach(), self.beta * (policy - reference).detach())
        sums[KL] = (kl, torch.ones_like(kl))
        return self._finish_loss(model, inputs, loss, outputs, sums, return_outputs)

    def _derived(self, means: dict[str, float]) -> dict[str, float]:
        """Add the margin if both kinds of rows were seen."""
        if "rewards/chosen" in means and "rewards/rejected" in means:
            return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
        return means


def _run(model: Any, batch: dict[str, Any], prefix: str = "", **options: Any) -> Any:
    """Run a forward of the completions, or, with the prefix `KL_`, of the mismatched ones."""
    ids = batch[f"{prefix}input_ids"]
    labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": batch[f"{prefix}attention_mask"], "labels": labels}
    return run_padded(model, inputs, batch.get(PICTURES), **options)


def _tokens(batch: dict[str, Any], prefix: str = "") -> Tokens:
    """Count the tokens of a forward of the completions, or, with the prefix `KL_`, of the mismatched ones."""
    lengths = batch[f"{prefix}attention_mask"].sum(dim=1)
    return Tokens(lengths.sum(), triangle(lengths).sum(), batch[f"{prefix}completion_mask"].sum())


def _sums(outputs: Any, batch: dict[str, torch.Tensor], logps: torch.Tensor, rewards: torch.Tensor) -> MetricSums:
    """Return metrics by TRL's names; `chosen` are the rows with a true label."""
    mask = batch["completion_mask"][:, 1:].bool()
    sums: MetricSums = {"entropy": ((outputs.entropy.detach() * mask).sum(), mask.sum())}
    for name, rows in (("chosen", batch["label"]), ("rejected", ~batch["label"])):
        tokens = mask & rows.unsqueeze(1)
        sums[f"logits/{name}"] = ((outputs.mean_logits.detach() * tokens).sum(), tokens.sum())
        sums[f"rewards/{name}"] = ((rewards * rows).sum(), rows.sum())
        sums[f"logps/{name}"] = ((logps * rows).sum(), rows.sum())
    return sums
