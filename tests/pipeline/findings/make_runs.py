"""`python -m tests.pipeline.findings.make_runs` trains tiny models and writes their metrics to `runs/`, for tests of the rules.

Each run is of one recipe and seed, on the demo's pairs, from a tiny model that has first been trained on their chosen and
rejected answers; about a second of processor time each. `spoiled-` runs have one fault.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

from pipeline.demo.preferences import preference_pairs
from strategies import HFRLTrainerBuilder
from tests.tiny import seeded, tiny_model, tiny_tokenizer

__all__ = ["RUNS", "base_model", "pairs_of_demo"]

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
}
SPOILED: dict[str, dict[str, Any]] = {
    "rate-times-100": {"learning_rate": 5e-2},
    "rate-times-1000": {"learning_rate": 5e-1},
    "rate-too-low": {"learning_rate": 5e-9},
    "rate-zero": {"learning_rate": 1e-14},
    "warming-up": {"warmup_steps": 400},
    "wrong-reference": {},
    "nothing-attached": {},
}


KEPT = re.compile(
    r"step|(eval_)?(loss|kl|rewards/\w+|logps/\w+)|grad_norm|learning_rate|(fed_)?tokens_per_second|seconds/(data|step)"
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
        if name == "wrong-reference":
            builder.model_ref = seeded(type(base), base.config, 5)
        trainer = builder.build()
        if name == "nothing-attached":
            # An adapter that isn't reached: nothing that is trained takes part in the forward.
            for parameter in trainer.model.parameters():
                parameter.register_hook(torch.zeros_like)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return recipe, [
        {key: _short(value) for key, value in entry.items() if KEPT.fullmatch(key)} for entry in trainer.state.log_history
    ]


def main() -> None:
    """Write all runs: a line with the recipe, then a line per record."""
    torch.set_num_threads(1)
    disable_progress_bars()
    base = base_model()
    named = {**HEALTHY, **{f"spoiled-{name}": keys for name, keys in SPOILED.items()}}
    for name, keys in named.items():
        recipe, records = train(name.removeprefix("spoiled-"), base, keys)
        (RUNS / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [recipe, *records]))
        print(name, records[-2].get("eval_loss"), flush=True)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


if __name__ == "__main__":
    main()
