"""The two sides of a comparison: TRL's `DPOTrainer` and `AxolotlDPOTrainer`, on the same pairs in the same order."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from datasets import Dataset, Image, List
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.common import Row, saved_bytes
from benchmarks.vision import saved_bytes_of_a_picture
from strategies import HFRLTrainerBuilder
from strategies.batch.plan import BatchPlan
from strategies.config import as_config
from strategies.inference.scoring import PairScorer
from strategies.vision.processing import VisionProcessing

__all__ = ["PEER_SETTINGS", "largest_micro_batch", "our_trainer", "scored", "trl_trainer"]

SEED = 42
LEARNING_RATE = 1e-6
PEER_SETTINGS = {
    "shipped": {"activation_checkpointing": True, "precompute_ref_log_probs": False},
    "best": {"activation_checkpointing": False, "precompute_ref_log_probs": True},
}
"""TRL as it ships, and at its best: nothing recomputed, the reference's log-probabilities computed before the clock starts.

It refuses the latter for rows with pictures, whose reference is always live.
"""
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
RAW = ("images", "prompt", "chosen", "rejected")


def scored(model: Any, processing: Any, rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """The rows with the reference's log-probabilities, as the score stage adds them."""
    pictures = {"vision": VisionProcessing(processing)} if isinstance(processing, ProcessorMixin) else {}
    dtype = torch.bfloat16 if options.bf16 else None
    found = PairScorer(model.eval(), 2 * options.sequence_len, dtype, **pictures).score(rows)
    return [
        {**row, "ref_chosen_logps": chosen.tolist(), "ref_rejected_logps": rejected.tolist()}
        for row, (chosen, rejected) in zip(rows, found, strict=True)
    ]


def our_trainer(
    model: Any,
    processing: Any,
    rows: Sequence[Row],
    options: argparse.Namespace,
    folder: str,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> Any:
    """Ours with its defaults: packed rows, and the reference as the rows bring it, live where they don't.

    `processing` is a tokenizer, or the processor of a model that takes pictures.
    """
    processor = processing if isinstance(processing, ProcessorMixin) else None
    cfg = {
        "base_model": options.model,
        "rl": "dpo",
        "reference": "cached" if "ref_chosen_logps" in rows[0] else "live",
        "sequence_len": options.sequence_len,
        "micro_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "seed": SEED,
        "bf16": options.bf16,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "output_dir": f"{folder}/ours",
        # Pixels are made in the step, as TRL's are: other processes would make them off the clock.
        **({"dataloader_num_workers": 0} if processor is not None else {}),
    }
    tokenizer = processing.tokenizer if processor is not None else processing
    builder = HFRLTrainerBuilder(as_config({**cfg, **keys}), model, tokenizer, processor)
    # Raw columns besides, of the same names as those of prepared rows, are TRL's.
    builder.train_dataset = [{name: row[name] for name in row if name not in RAW or name == "images"} for row in rows]
    builder.callbacks = list(callbacks)
    trainer = builder.build()
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_trainer(
    model: Any,
    processing: Any,
    rows: Sequence[Row],
    options: argparse.Namespace,
    folder: str,
    settings: str,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> Any:
    """TRL's with one of `PEER_SETTINGS`; our plan's order, which TRL is told to keep.

    As it ships it takes a global batch in one forward, at its best as many pairs as fit in memory.
    """
    micro = options.batch if settings == "shipped" else options.micro_batch or largest_micro_batch(model, options)
    has_pictures = isinstance(processing, ProcessorMixin)
    chosen = PEER_SETTINGS[settings] | ({"precompute_ref_log_probs": False} if has_pictures else {})
    args = DPOConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.batch // micro,
        max_length=options.sequence_len,
        max_steps=options.steps,
        lr_scheduler_type="constant",
        seed=SEED,
        bf16=options.bf16,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        average_tokens_across_devices=False,
        train_sampling_strategy="sequential",
        **chosen,
        **{"learning_rate": LEARNING_RATE, **arguments},
    )
    columns = RAW if has_pictures else IDS
    ordered = [{name: rows[row][name] for name in columns} for row in BatchPlan(len(rows), options.batch, SEED).order(0)]
    dataset = Dataset.from_list(ordered)
    trainer = _PreparedDPOTrainer(
        model,
        None if chosen["precompute_ref_log_probs"] else copy.deepcopy(model).eval(),
        args,
        train_dataset=dataset.cast_column("images", List(Image())) if has_pictures else dataset,
        processing_class=processing,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _PreparedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokenised already; those with pictures are tokenised in the step, as it ships."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def largest_micro_batch(model: Any, options: argparse.Namespace) -> int:
    """The largest divisor of the batch whose activations fit in half of the free memory, padded to the full length.

    Beside them stand gradients and AdamW's two moments of this policy, the same of another, and what the other side trains.
    """
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    room = 0.5 * psutil.virtual_memory().available - 7 * weights
    pair = 2 * options.sequence_len * saved_bytes_per_token(model)
    if getattr(options, "vision", False):
        pair += 2 * saved_bytes_of_a_picture(model)  # TRL encodes it for each answer
    divisors = [number for number in range(1, options.batch + 1) if options.batch % number == 0]
    return max((number for number in divisors if number * pair <= room), default=1)


def saved_bytes_per_token(model: Any) -> float:
    """Bytes that the backbone keeps per token for its backward pass, in the precision of its weights."""
    tokens = 64
    ids = torch.ones(1, tokens, dtype=torch.long)
    return saved_bytes(model, lambda: model.base_model(input_ids=ids, use_cache=False)) / tokens
