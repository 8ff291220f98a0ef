"""`python -m tests.pipeline.findings.make_runs [NAMES]` trains tiny models and writes their metrics to `runs/`.

Tests of the rules read them. Each run is of one recipe and seed, on the demo's pairs, from a tiny model that has first been
trained on their chosen and rejected answers; a few seconds of processor time each. `spoiled-` runs have one fault. The files
`ray-*` are those of `make_ray_runs.py`. The first line of a file has the recipe and what else rules look at.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

from pipeline.demo.preferences import preference_pairs
from pipeline.findings.facts import RowCounts, RunFacts
from strategies import HFRLTrainerBuilder
from tests.tiny import tiny_model, tiny_tokenizer

__all__ = ["RUNS", "base_model", "pairs_of_demo", "write_run"]

RUNS = Path(__file__).parent / "runs"
COMMON: dict[str, Any] = {
    "base_model": "tiny",
    "learning_rate": 5e-4,
    "warmup_steps": 4,
    "sequence_len": 256,
    "micro_batch_size": 8,
    "max_steps": 40,
    "logging_steps": 1,
    "eval_steps": 10,
    "save_strategy": "no",
    "bf16": False,
}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "learning_rate": 5e-3}
HEALTHY: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo-seed-1": {"seed": 1},
    "dpo-seed-2": {"seed": 2, "micro_batch_size": 4},
    "dpo-lora": LORA,
    "dpo-smoothed": {"dpo_label_smoothing": 0.1},
    "dpo-hinge": {"dpo_loss_type": ["hinge"]},
    "dpo-nll": {"rpo_alpha": 1.0},
    "ipo": {"rl": "ipo"},
    "simpo": {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"rl": "orpo"},
    "kto": {"rl": "kto"},
    "kto-lora": {"rl": "kto", **LORA},
    "grpo": {
        "rl": "grpo",
        "learning_rate": 2e-4,
        "trl": {
            "beta": 0.04,
            "num_generations": 4,
            "max_completion_length": 24,
            "reward_funcs": ["tests.reward_functions.low_tokens"],
        },
    },
}
SPOILED: dict[str, dict[str, Any]] = {
    "rate-times-1000": {"learning_rate": 5e-1},
    "rate-too-low": {"learning_rate": 5e-9},
    "warming-up": {"warmup_steps": 400},
    "nothing-attached": {},
}


KEPT = re.compile(
    r"step|(eval_)?(loss|kl|rewards/\w+|logps/\w+)|grad_norm|learning_rate|(fed_)?tokens_per_second|seconds/(data|step)"
    r"|reward|frac_reward_zero_std|completions/(mean_length|clipped_ratio)|skipped_steps"
)
"""Metrics that rules look at."""


def pairs_of_demo(held_out: bool) -> list[dict[str, str]]:
    """The demo's pairs as plain text."""
    return [
        {
            "prompt": row["prompt"][0]["content"] + " ",
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in preference_pairs(held_out)
    ]


def base_model(steps: int = 150, sides: tuple[str, ...] = ("chosen", "rejected")) -> Any:
    """A tiny model that has learned to answer like one side of the demo's pairs, or like both."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in pairs_of_demo(False) for side in sides]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        chosen = [texts[int(index)] for index in torch.randint(len(texts), (16,), generator=generator)]
        batch = tokenizer(chosen, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def rows_of(keys: dict[str, Any], held_out: bool) -> list[dict[str, Any]]:
    """The rows that a recipe trains on."""
    pairs = pairs_of_demo(held_out)
    if keys.get("rl") == "grpo":
        return [{"prompt": pair["prompt"]} for pair in pairs]
    if keys.get("rl") != "kto":
        return pairs
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": pair["prompt"], "completion": pair[side], "label": label} for pair in pairs for side, label in sides]


def train(name: str, base: Any, keys: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train a copy of `base`; returns the recipe and the records."""
    recipe = {**COMMON, **keys}
    with tempfile.TemporaryDirectory() as folder:
        builder = HFRLTrainerBuilder({**recipe, "output_dir": folder}, copy.deepcopy(base), tiny_tokenizer())
        builder.train_dataset, builder.eval_dataset = (Dataset.from_list(rows_of(keys, held_out)) for held_out in (False, True))
        trainer = builder.build()
        if name == "nothing-attached":
            # An adapter that isn't reached: nothing that is trained takes part in the forward.
            for parameter in trainer.model.parameters():
                parameter.register_hook(torch.zeros_like)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return recipe, trainer.state.log_history


def write_run(name: str, recipe: dict[str, Any], records: Sequence[dict[str, Any]], facts: RunFacts | None = None) -> None:
    """Write a run: a line with its recipe, rows and scores, then a line per record.

    Args:
        facts: of its folder; None for a run in one process, which has none.
    """
    kind = recipe.get("rl", "dpo")
    counts = asdict(facts.rows) if facts is not None and facts.rows else asdict(RowCounts(240, 60, 240, 240))
    gap = asdict(facts.gap) if facts is not None and facts.gap else None
    packed = facts.setup["packed"] if facts is not None else kind not in ("kto", "grpo")
    kept = [{key: _short(value) for key, value in record.items() if KEPT.fullmatch(key)} for record in records]
    lines = [{"recipe": recipe, "packed": packed, "rows": counts, "gap": gap}, *kept]
    (RUNS / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(names: Sequence[str]) -> None:
    """Make the named runs; all when there are no names."""
    torch.set_num_threads(1)
    disable_progress_bars()
    base = base_model()
    named = {**HEALTHY, **{f"spoiled-{name}": keys for name, keys in SPOILED.items()}}
    for name in names or named:
        recipe, records = train(name.removeprefix("spoiled-"), base, named[name])
        write_run(name, recipe, records)
        print(name, records[-1], flush=True)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


if __name__ == "__main__":
    main(sys.argv[1:])
