"""From a config, a model and a tokenizer to a trainer that is ready to run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import EarlyStoppingCallback, TrainerCallback

from strategies.answers import Answers
from strategies.base import Strategy
from strategies.cadence import RunLength, steps_per_epoch, total_steps
from strategies.callbacks import registered_callbacks
from strategies.config import as_config
from strategies.models import (
    build_peft_config,
    continue_adapter,
    disable_own_dropout,
    match_adapter_dtype,
    restore_adapter_dropout,
)
from strategies.precision import settle_bf16
from strategies.reference import load_reference
from strategies.registry import get_strategy
from strategies.rows import as_dataset, first_row, is_scored
from strategies.sharding import arguments_here
from strategies.trackers import tracker_environment
from strategies.training_args import common_arguments

__all__ = ["HFRLTrainerBuilder"]


class HFRLTrainerBuilder:
    """Builds the trainer of `cfg.rl`. Its attributes may be set before `build`.

    Args:
        cfg: a validated config, or a dict of the same keys.
        model: the policy: a plain model, or a PEFT model that brings its adapter.
        tokenizer: tokenizer of the policy.
        processor: processor of a vision-language policy, in the tokenizer's place.

    Attributes:
        train_dataset, eval_dataset: raw or prepared rows; or set them on the trainer.
        model_ref: the reference model; when None, `strategies.reference.load_reference` decides.
        peft_config: config of a new adapter; when None, that of the config's `adapter`.
        callbacks: further observers.
        extra_arguments: further arguments of the training-arguments class, such as `deepspeed`, or `fsdp` and `fsdp_config`.
            Under ZeRO-3 the model was loaded within `strategies.sharding.divided_loading`.
        world_size: number of workers that the global batch and the steps per epoch are counted by.
    """

    def __init__(self, cfg: Any, model: Any, tokenizer: Any, processor: Any = None) -> None:
        self.cfg = self._settled(as_config(cfg), model)
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.model_ref: Any = None
        self.peft_config: Any = None
        self.callbacks: list[TrainerCallback] = []
        self.extra_arguments: dict[str, Any] = {}
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))

    @staticmethod
    def _settled(cfg: Any, model: Any) -> Any:
        if torch.accelerator.is_available():
            return cfg
        return settle_bf16(cfg, lambda: getattr(model.config.get_text_config(), "hidden_size", None))

    def build(self, total_num_steps: int | None = None) -> Any:
        """Return the trainer.

        Args:
            total_num_steps: optimizer steps to run; None runs `num_epochs` epochs. `max_steps` in the config wins.

        Raises:
            ValueError: naming the config key that doesn't fit, or rows that can't be trained on.
        """
        cfg, strategy = self.cfg, get_strategy(self.cfg.rl)
        if problems := [f"{path}: {message}" for path, message in strategy.find_batch_problems(cfg, self.world_size)]:
            raise ValueError("\n".join(problems))
        if self.model_ref is not None and not strategy.uses_reference(cfg):
            raise ValueError(f"model_ref: rl: {cfg.rl} uses no reference model; leave it out")
        # transformers' tracker callbacks take their settings from the environment only, and read it when constructed.
        os.environ.update(tracker_environment(cfg))
        arguments = {**common_arguments(cfg, self._length(total_num_steps)), **strategy.set_training_args_kwargs(cfg)}
        arguments |= strategy.batch_arguments(cfg, self.world_size)
        args = strategy.get_training_args_class()(**{**arguments, **arguments_here(self._extra_arguments())})
        model, peft_config = self._policy()
        uses_reference = strategy.uses_reference(cfg)
        references: dict[str, Any] = {}
        if self._cached_reference(strategy):
            references["cached_reference"] = True
        elif uses_reference:
            given = self.model_ref
            references["ref_model"] = given if given is not None else load_reference(cfg, model, self.tokenizer)
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
            **references,
            **strategy.set_trainer_kwargs(cfg),
        )
        _check_head(trainer.model)
        if getattr(cfg, "disable_dropout", False):
            disable_own_dropout(trainer.model)
        restore_adapter_dropout(trainer.model)
        if cfg.peft_autocast_adapter_dtype is False:
            match_adapter_dtype(trainer.model)
        if cfg.dpo_generate_during_eval:
            trainer.answers = Answers(trainer)
        return trainer

    def _extra_arguments(self) -> dict[str, Any]:
        """Those that were set; a config that asks for sharding says so to others, who set what it means."""
        for name in ("deepspeed", "fsdp_config"):
            if getattr(self.cfg, name, None) is not None and name not in self.extra_arguments:
                raise ValueError(
                    f"{name}: set builder.extra_arguments to cluster.sharding.sharding_arguments(cfg), or remove the key to "
                    "train unsharded"
                )
        return self.extra_arguments

    def _cached_reference(self, strategy: type[Strategy]) -> bool:
        """Whether the rows bring the reference: as the config says, or, where it doesn't, if they do."""
        if self.model_ref is not None or strategy.reference_mode(self.cfg) != "cached":
            return False
        given = [rows for rows in (self.train_dataset, self.eval_dataset) if rows is not None]
        return self.cfg.reference == "cached" or (self.train_dataset is not None and all(map(_are_scored, given)))

    def _policy(self) -> tuple[Any, Any]:
        """The model to train, and the config of an adapter that the trainer is to create on it."""
        if isinstance(self.model, PeftModel) or self.cfg.adapter is None:
            return self.model, self.peft_config
        if self.cfg.lora_model_dir is not None:
            return continue_adapter(self.cfg, self.model), None
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
        ]


def _check_head(model: Any) -> None:
    """Refuse an adapter on the output head: log-probabilities are computed from the head's weight, past its adapter."""
    if isinstance(model, PeftModel) and isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "lora_target_modules: the output head can't have an adapter, for log-probabilities are computed from its weight "
            "alone; leave it out, or train it as a whole (lora_modules_to_save)"
        )


def _are_scored(rows: Any) -> bool:
    splits = list(rows.values()) if isinstance(rows, dict) else [rows]
    return all(is_scored(first_row(as_dataset(split, "rows")), "rows") for split in splits)


def _dataset_tags(cfg: Any) -> list[str]:
    """Hub names among `datasets:`, where the config has that section; local files say nothing to others."""
    paths = [getattr(entry, "path", None) for entry in getattr(cfg, "datasets", None) or []]
    return [path for path in paths if path and "://" not in path and not Path(path).exists() and path.count("/") == 1]
