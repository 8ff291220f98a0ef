"""Builds a trainer from a config, a model and a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import EarlyStoppingCallback, ProcessorMixin, TrainerCallback

from strategies.callbacks import registered_callbacks
from strategies.config import as_config
from strategies.config.arguments import common_arguments
from strategies.config.schedule import RunLength, steps_per_epoch, total_steps
from strategies.config.trackers import tracker_environment
from strategies.dataset_rows import as_dataset, first_row, is_scored
from strategies.inference.reference import load_reference
from strategies.methods.base import Strategy
from strategies.methods.registry import get_strategy
from strategies.mixins.checkpoint import CheckpointStorage
from strategies.models.loading import (
    build_peft_config,
    check_adapter,
    continue_adapter,
    disable_own_dropout,
    match_adapter_dtype,
    restore_adapter_dropout,
)
from strategies.models.precision import resolve_bf16
from strategies.models.sharding import localize_arguments
from strategies.profiling import ProfileCallback
from strategies.vision.checks import check_belongs
from strategies.vision.modules import freeze_tower, has_tower
from strategies.vision.sizes import with_size

__all__ = ["HFRLTrainerBuilder"]


class HFRLTrainerBuilder:
    """Builds the trainer of `cfg.rl`. Its attributes may be set before `build`.

    Args:
        cfg: a validated config, or a dict of the same keys.
        model: the policy: a plain model, or a PEFT model with its adapter.
        tokenizer: tokenizer of the policy.
        processor: processor of a vision-language policy, for rows with pictures; without it such a policy's tower is frozen.

    Attributes:
        train_dataset, eval_dataset: raw or prepared rows; may also be set on the trainer.
        model_ref: the reference model; if None, it is loaded by `strategies.inference.reference.load_reference`.
        peft_config: config of a new adapter; if None, built from the config's `adapter`.
        callbacks: further callbacks.
        extra_arguments: further arguments of the training-arguments class, such as `deepspeed`, or `fsdp` and `fsdp_config`.
            Under ZeRO-3 the model must be loaded within `strategies.models.sharding.zero3_init_context`.
        identity: further names that identify this run's checkpoints, such as its data; others are refused.
        checkpoint_storage: where checkpoints are stored, if not in the output folder.
        world_size: number of workers that determines the global batch and the steps per epoch.
    """

    def __init__(self, cfg: Any, model: Any, tokenizer: Any, processor: Any = None) -> None:
        self.cfg = self._resolve_precision(as_config(cfg), model)
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.model_ref: Any = None
        self.peft_config: Any = None
        self.callbacks: list[TrainerCallback] = []
        self.extra_arguments: dict[str, Any] = {}
        self.identity: dict[str, str] = {}
        self.checkpoint_storage: CheckpointStorage | None = None
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def _resolve_precision(cfg: Any, model: Any) -> Any:
        if torch.accelerator.is_available():
            return cfg
        # On the CPU alone: of a GPU, `common_arguments` resolves `auto`.
        return resolve_bf16(cfg, lambda: getattr(model.config.get_text_config(), "hidden_size", None))

    def build(self, total_num_steps: int | None = None) -> Any:
        """Return the trainer.

        Args:
            total_num_steps: optimizer steps to run; None runs `num_epochs` epochs. `max_steps` in the config wins.

        Raises:
            ValueError: naming the invalid config key, or rows that can't be trained on.
        """
        cfg, strategy = self.cfg, get_strategy(self.cfg.rl)
        if problems := [f"{path}: {message}" for path, message in strategy.find_batch_problems(cfg, self.world_size)]:
            raise ValueError("\n".join(problems))
        if self.model_ref is not None and not strategy.uses_reference(cfg):
            raise ValueError(f"model_ref: rl: {cfg.rl} uses no reference model; leave it out")
        # transformers' tracker callbacks are configured by environment variables only, read in their constructors.
        os.environ.update(tracker_environment(cfg))
        arguments = {**common_arguments(cfg, self._length(total_num_steps)), **strategy.set_training_args_kwargs(cfg)}
        arguments |= strategy.batch_arguments(cfg, self.world_size)
        args = strategy.get_training_args_class()(**{**arguments, **localize_arguments(self._extra_arguments())})
        self._apply_picture_keys()
        model, peft_config = self._policy()
        uses_reference = strategy.uses_reference(cfg)
        references: dict[str, Any] = {}
        if self._cached_reference(strategy):
            references["cached_reference"] = True
        elif uses_reference:
            # Before the trainer adds an adapter, without which a copy of the policy is the reference.
            custom = self.model_ref
            references["ref_model"] = custom if custom is not None else load_reference(cfg, model, self.tokenizer)
        is_initial_policy = cfg.reference_model is None and self.model_ref is None
        trainer = strategy.get_trainer_class()(
            model=model,
            args=args,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processor if self.processor is not None else self.tokenizer,
            peft_config=peft_config,
            callbacks=self._callbacks(),
            dataset_tags=_dataset_tags(cfg),
            base_model=cfg.base_model,
            rl=cfg.rl,
            uses_reference=uses_reference,
            starts_at_reference=uses_reference
            and is_initial_policy
            and ("ref_model" in references or cfg.reference == "cached"),
            generates_answers=cfg.dpo_generate_during_eval,
            identity=self.identity,
            checkpoint_storage=self.checkpoint_storage,
            **references,
            **strategy.set_trainer_kwargs(cfg),
        )
        # Only now does a new adapter exist, and has TRL's `disable_dropout` been applied.
        _check_head(trainer.model)
        if getattr(cfg, "disable_dropout", False):
            disable_own_dropout(trainer.model)
        restore_adapter_dropout(trainer.model)
        if cfg.peft_autocast_adapter_dtype is False:
            match_adapter_dtype(trainer.model)
        return trainer

    def _apply_picture_keys(self) -> None:
        """Set the size of pictures, and freeze the tower where rows are text alone or the config says so."""
        cfg = self.cfg
        if cfg.freeze_mm_modules and not has_tower(self.model):
            raise ValueError(f"freeze_mm_modules: base_model {cfg.base_model!r} takes no pictures; remove the key")
        if self.processor is None or cfg.freeze_mm_modules:
            freeze_tower(self.model)
        if self.processor is not None:
            if isinstance(self.processor, ProcessorMixin):
                given = self.model.name_or_path or self.model.config.model_type
                check_belongs(self.model.config, self.processor, given)
                # Mllama attends to pictures across: it would be run without the mask of which text sees which picture.
                if not has_tower(self.model):
                    raise ValueError(
                        f"base_model: {given!r} ({self.model.config.model_type}) doesn't put pictures in place of tokens, as "
                        "is needed here; choose another vision-language model, or train on text without a processor"
                    )
            with_size(self.processor, cfg.image_size, cfg.image_resize_algorithm)

    def _extra_arguments(self) -> dict[str, Any]:
        """Return the extra arguments. Sharding keys of the config must have been converted to them by the caller."""
        for name in ("deepspeed", "fsdp_config"):
            if getattr(self.cfg, name, None) is not None and name not in self.extra_arguments:
                raise ValueError(
                    f"{name}: set builder.extra_arguments to cluster.sharding.sharding_arguments(cfg), or remove the key to "
                    "train unsharded"
                )
        return self.extra_arguments

    def _cached_reference(self, strategy: type[Strategy]) -> bool:
        """Return whether the rows contain the reference's log-probabilities: required by the config, or else found."""
        if self.model_ref is not None or strategy.reference_mode(self.cfg) != "cached":
            return False
        datasets = [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]
        # All sets: an evaluation set without scores needs the reference itself.
        return self.cfg.reference == "cached" or (self.train_dataset is not None and all(map(_are_scored, datasets)))

    def _policy(self) -> tuple[Any, Any]:
        """Return the model to train, and the config of an adapter that the trainer creates on it."""
        if isinstance(self.model, PeftModel) or self.cfg.adapter is None:
            return self.model, self.peft_config
        if self.cfg.lora_model_dir is not None:
            return continue_adapter(self.cfg, self.model), None
        check_adapter(self.cfg)
        return self.model, self.peft_config if self.peft_config is not None else build_peft_config(self.cfg, self.model)

    def _length(self, total_num_steps: int | None) -> RunLength:
        fixed = self.cfg.max_steps or total_num_steps
        if self.train_dataset is None or not hasattr(self.train_dataset, "__len__"):
            return RunLength(total_steps=fixed, expected_steps=fixed, steps_per_epoch=None)
        rows = len(self.train_dataset)
        return RunLength(
            total_steps=fixed,
            expected_steps=fixed or total_steps(rows, self.cfg, self.world_size),
            steps_per_epoch=steps_per_epoch(rows, self.cfg, self.world_size),
        )

    def _callbacks(self) -> list[TrainerCallback]:
        patience = self.cfg.early_stopping_patience
        return [
            *self.callbacks,
            *registered_callbacks(self.cfg),
            *([EarlyStoppingCallback(patience)] if patience is not None else []),
            *([ProfileCallback(Path(self.cfg.output_dir), *self.cfg.profile.steps)] if self.cfg.profile is not None else []),
        ]


def _check_head(model: Any) -> None:
    """Raise for an adapter on the output head: log-probabilities are computed from the head's weight, without adapter."""
    head = model.get_base_model().get_output_embeddings() if isinstance(model, PeftModel) else None
    if isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            "peft_trainable_token_indices: the embeddings of this model are its output head too, and log-probabilities are "
            "computed from the head's weight alone; train them as a whole (lora_modules_to_save: [embed_tokens, lm_head])"
        )
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "lora_target_modules: the output head can't have an adapter, for log-probabilities are computed from its weight "
            "alone; leave it out, or train it as a whole (lora_modules_to_save)"
        )


def _are_scored(rows: Any) -> bool:
    splits = list(rows.values()) if isinstance(rows, dict) else [rows]
    # One row stands for all: rows of a data set have the same columns.
    return all(is_scored(first_row(as_dataset(split, "rows")), "rows") for split in splits)


def _dataset_tags(cfg: Any) -> list[str]:
    """Return the hub ids in `datasets:`, if the config has that section; local paths mean nothing to other users."""
    paths = [getattr(entry, "path", None) for entry in getattr(cfg, "datasets", None) or []]
    return [path for path in paths if path and "://" not in path and not Path(path).exists() and path.count("/") == 1]
