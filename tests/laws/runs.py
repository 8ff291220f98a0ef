"""Short training runs whose losses the laws compare."""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from strategies.dataset_rows import REFERENCE_COLUMNS
from strategies.inference.scoring import PairScorer
from tests.tiny import prepared_labelled, prepared_pairs, tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer

# The models are so small that a second thread costs more than it helps.
torch.set_num_threads(1)

CONFIG: dict[str, Any] = {
    "base_model": "tiny",
    "rl": "dpo",
    "learning_rate": 1e-3,
    "num_epochs": 1.0,
    "sequence_len": 128,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
}
REPORTED = ("loss", "eval_loss", "eval_rewards/margins", "eval_logps/chosen", "rewards/margins", "num_tokens")
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}
FAMILIES = {"llama": tiny_model, "qwen": tiny_qwen, "gpt2": tiny_gpt2}
UNLIKE = ("_runtime", "_per_second", "_seconds", "total_flos", "operations/step", "mfu")
"""Ends of the names of what depends on the time, or on how many tokens were fed."""


def alike(record: dict[str, Any]) -> dict[str, Any]:
    """What doesn't depend on the time in a record."""
    return {name: value for name, value in record.items() if not name.endswith(UNLIKE) and not name.startswith("seconds/")}


def losses(trainer: Any, name: str = "loss") -> list[float]:
    """The logged values of a metric, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def prepared(number: int, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the kind that `keys` trains on, prepared but for prompts."""
    if keys.get("rl") == "grpo":
        return [{"prompt": f"What is {row} plus {row % 5}? "} for row in range(number)]
    return prepared_labelled(number) if keys.get("rl") == "kto" else prepared_pairs(number)


def opinionated(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A tiny model with weights so large that each token's distribution depends on all tokens before it.

    A fresh model is nearly uniform: a token that sees what it should not hardly changes its answer.
    """
    return FAMILIES[family](tiny_tokenizer(), seed, **{"initializer_range": 0.15, **overrides})


def scored(rows: Sequence[dict[str, Any]], model: Any, budget: int = 200) -> list[dict[str, Any]]:
    """The rows with the log-probabilities of a copy of `model`: scoring prepares the model for packed rows."""
    scores = PairScorer(copy.deepcopy(model).eval(), budget).score(rows)
    return [{**row, **dict(zip(REFERENCE_COLUMNS, pair, strict=True))} for row, pair in zip(rows, scores, strict=True)]


@cache
def _settle() -> None:
    """Leave what is imported out of later collections: every run asks for one, which takes longer than its steps."""
    gc.freeze()


def built(
    folder: Path,
    rows: Any = None,
    extra: dict[str, Any] | None = None,
    eval_rows: Any = 4,
    model: Any = None,
    **keys: Any,
) -> Any:
    """The trainer of `trained`, before its first step."""
    from strategies import HFRLTrainerBuilder

    _settle()
    tokenizer = tiny_tokenizer()
    policy = model if model is not None else tiny_model(tokenizer)
    builder = HFRLTrainerBuilder({**CONFIG, "output_dir": str(folder), **keys}, policy, tokenizer)
    builder.train_dataset = rows if rows is not None else prepared(16, keys)
    evaluated = prepared(eval_rows, keys) if isinstance(eval_rows, int) else eval_rows
    builder.eval_dataset = evaluated if "eval_steps" in keys else None
    builder.extra_arguments = extra or {}
    return builder.build()


def trained(folder: Path, **keys: Any) -> Any:
    """Train a tiny model with `CONFIG` and `keys`, and evaluate on some rows where they ask for it.

    Args (beside keys of the config):
        rows: prepared rows to train on.
        extra: further arguments of the trainer's arguments.
        eval_rows: rows to evaluate on, or how many of the rows above.
        model: the policy; `tiny_model` when not given.
    """
    trainer = built(folder, **keys)
    trainer.train()
    return trainer


def same_history(one: Any, other: Any, rel: float = 1e-4, absolute: float = 5e-6) -> None:
    """Assert that everything two runs logged is equal, whatever it is, but for `UNLIKE`.

    The absolute tolerance is for what is 0 up to rounding: margins before the first step, mean logits of a fresh model.
    Whether such margins are positive is a coin's toss, so their accuracies aren't compared.
    """
    assert len(one.state.log_history) == len(other.state.log_history)
    for left, right in zip(map(alike, one.state.log_history), map(alike, other.state.log_history), strict=True):
        assert set(left) == set(right)
        for name in left:
            of_rounding = name.endswith("accuracies") and abs(left[name.replace("accuracies", "margins")]) <= absolute
            if of_rounding:
                continue
            assert left[name] == pytest.approx(right[name], rel=rel, abs=absolute), f"{name} of step {left['step']}"


class CountingDDP(torch.nn.parallel.DistributedDataParallel):
    """Counts how often gradients are exchanged; of the buckets that they travel in, the last."""

    exchanges = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self._counted)

    @staticmethod
    def _counted(state, bucket):  # torch compares annotations with classes, and here they are text
        CountingDDP.exchanges += bucket.is_last()
        return allreduce_hook(state, bucket)


def join(rank: int, world_size: int, port: int) -> None:
    """Make this process one of a group that the first trainer connects."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)


def worker(rank: int, world_size: int, port: int, folder: str, runs: dict[str, dict[str, Any]]) -> None:
    """One process of a gloo group: trains every run, and rank 0 leaves `{name}.json` with losses and steps."""
    join(rank, world_size, port)
    torch.nn.parallel.DistributedDataParallel = CountingDDP
    for name, keys in runs.items():
        rows = prepared(keys.pop("rows", 16), keys)
        CountingDDP.exchanges = 0
        trainer = trained(Path(folder) / name, rows=rows, **keys)
        found = {name: losses(trainer, name) for name in REPORTED}
        found["steps"] = trainer.state.max_steps
        found["exchanges"] = CountingDDP.exchanges
        if rank == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps(found))
