"""The two sides of a comparison: TRL's `DPOTrainer` and `AxolotlDPOTrainer`, on the same pairs in the same order."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.common import Row
from strategies import HFRLTrainerBuilder
from strategies.batch.plan import BatchPlan
from strategies.config import as_config
from strategies.inference.scoring import PairScorer

__all__ = ["PEER_SETTINGS", "largest_micro_batch", "our_trainer", "scored", "trl_trainer"]

SEED = 42
LEARNING_RATE = 1e-6
PEER_SETTINGS = {
    "shipped": {"activation_checkpointing": True, "precompute_ref_log_probs": False},
    "best": {"activation_checkpointing": False, "precompute_ref_log_probs": True},
}
"""TRL as it ships, and at its best: nothing recomputed, the reference's log-probabilities computed before the clock starts."""


def scored(model: Any, rows: Sequence[Row], options: argparse.Namespace) -> list[Row]:
    """The rows with the reference's log-probabilities, as the score stage adds them."""
    scorer = PairScorer(model.eval(), 2 * options.sequence_len, torch.bfloat16 if options.bf16 else None)
    found = scorer.score(rows)
    return [
        {**row, "ref_chosen_logps": chosen.tolist(), "ref_rejected_logps": rejected.tolist()}
        for row, (chosen, rejected) in zip(rows, found, strict=True)
    ]


def our_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    options: argparse.Namespace,
    folder: str,
    callbacks: Sequence[TrainerCallback] = (),
    **keys: Any,
) -> Any:
    """Ours with its defaults: packed rows, and the reference as the rows bring it, live where they don't."""
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
    }
    builder = HFRLTrainerBuilder(as_config({**cfg, **keys}), model, tokenizer)
    builder.train_dataset = list(rows)
    builder.callbacks = list(callbacks)
    trainer = builder.build()
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_trainer(
    model: Any,
    tokenizer: Any,
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
    chosen = PEER_SETTINGS[settings]
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
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    ordered = [{name: rows[row][name] for name in ids} for row in BatchPlan(len(rows), options.batch, SEED).order(0)]
    trainer = _PreparedDPOTrainer(
        model,
        None if chosen["precompute_ref_log_probs"] else copy.deepcopy(model).eval(),
        args,
        train_dataset=Dataset.from_list(ordered),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _PreparedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def largest_micro_batch(model: Any, options: argparse.Namespace) -> int:
    """The largest divisor of the batch whose activations fit in half of the free memory, padded to the full length.

    Beside them stand gradients and AdamW's two moments of this policy, the same of another, and what the other side trains.
    """
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    room = 0.5 * psutil.virtual_memory().available - 7 * weights
    pair = 2 * options.sequence_len * saved_bytes_per_token(model)
    divisors = [number for number in range(1, options.batch + 1) if options.batch % number == 0]
    return max((number for number in divisors if number * pair <= room), default=1)


def saved_bytes_per_token(model: Any) -> float:
    """Bytes that the backbone keeps per token for its backward pass, in the precision of its weights."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = 64
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.base_model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False)
    del states
    return sum(kept.values()) / tokens
