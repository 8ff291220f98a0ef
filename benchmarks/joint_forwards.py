"""`python -m benchmarks.joint_forwards`: rows of several slots in joint forwards against turns of whole steps.

Trials of LoRA on one base, with real trainers, optimizers and losses; each step of each trial is one row of one pair of so many
tokens. Both ways run in turn in one process; a trial's first two steps and its last one don't count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed

from benchmarks.common import MODEL, Row, Times, console, load, machine, parser, quiet, ratio_text
from strategies.builder import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.slots import Attach, Close, Ended, SharedBase, Slot, SlotHost

__all__ = ["main"]

WARM = 2
"""First steps that don't count."""
SIZE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}


class StepTimes(TrainerCallback):
    """Notes when steps of all trials end."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, Times]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One of them."""
        self.ends.append((state.global_step, Times.now()))

    def per_step(self, slots: int, steps: int) -> Times:
        """Return the time of a step while all trials run."""
        warm = [number for number, (step, _) in enumerate(self.ends) if step == WARM]
        assert len(warm) == slots
        begin, end = max(warm), min(number for number, (step, _) in enumerate(self.ends) if step == steps)
        passed = self.ends[end][1].since(self.ends[begin][1])
        return Times(passed.wall / (end - begin), passed.cpu / (end - begin))


def run(options: argparse.Namespace, base: SharedBase, tokenizer: Any, tokens: int, joint_tokens: int | None) -> Times:
    """Train all trials; return the time of one step of one of them."""
    times = StepTimes()
    rows = [pair(tokens, seed) for seed in range(options.steps)]

    def run_trial(slot: Slot) -> None:
        cfg = as_config(recipe(options, slot.payload, folder, tokens))
        set_seed(cfg.seed)
        builder = HFRLTrainerBuilder(cfg, slot.new_model(), tokenizer)
        builder.train_dataset = rows
        builder.callbacks.append(times)
        trainer = builder.build()
        trainer.remove_callback(PrinterCallback)
        slot.join(trainer)
        trainer.train()

    def on_end(ended: Ended) -> None:
        if ended.error is not None:
            raise RuntimeError(ended.traceback)

    with tempfile.TemporaryDirectory() as folder:
        commands = iter([[*(Attach(str(seed), seed) for seed in range(options.slots)), Close()]])
        SlotHost(base, run_trial, options.slots, joint_tokens=joint_tokens).run(lambda _: next(commands, []), on_end)
    return times.per_step(options.slots, options.steps)


def pair(tokens: int, seed: int) -> Row:
    """A pair that takes so many tokens of a row: half of them its prompt."""
    ids = torch.randint(10, 200, (tokens + 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    half, quarter = tokens // 2, tokens // 4
    return {"prompt_ids": ids[: half + 1], "chosen_ids": ids[half : half + quarter], "rejected_ids": ids[-quarter:]}


def recipe(options: argparse.Namespace, seed: int, folder: str, tokens: int) -> Row:
    """A trial's."""
    return {
        "base_model": options.model,
        "rl": "simpo",  # with a reference, its scores would be cached
        "adapter": "lora",
        "lora_r": options.rank,
        "lora_target_linear": True,
        "lora_dropout": options.dropout,
        "seed": seed,
        "micro_batch_size": 1,
        "sequence_len": tokens,
        "max_steps": options.steps,
        "save_strategy": "no",
        "logging_steps": options.steps,
        "bf16": options.bf16,
        "output_dir": str(Path(folder, str(seed))),
    }


def load_base(options: argparse.Namespace) -> tuple[SharedBase, Any]:
    """The base and its tokenizer."""
    if not options.tiny:
        model, tokenizer = load(options)
        return SharedBase(model), tokenizer
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    return SharedBase(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZE))), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    options = parser("joint_forwards", __doc__)
    options.add_argument("--slots", type=int, default=16)
    options.add_argument("--rank", type=int, default=8, help="of the adapters")
    options.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    options.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 256], help="of each row")
    options.add_argument("--joint-tokens", type=int, help="most tokens of a joint forward; the product's own when not given")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--tiny", action="store_true", help="a Llama of four layers and width 64 instead of --model")
    options.set_defaults(steps=8)
    given = options.parse_args(arguments)
    quiet(given.threads)
    base, tokenizer = load_base(given)
    named = "a tiny model" if given.tiny else given.model.replace(MODEL, "SmolLM2-135M")
    title = f"{given.slots} trials of LoRA r {given.rank} on {named}; {machine(given.threads)}"
    table = Table("tokens of a row", "turns ms", "joint ms", "faster, wall", "faster, CPU", title=title)
    for tokens in given.tokens:
        found = [
            (run(given, base, tokenizer, tokens, 0), run(given, base, tokenizer, tokens, given.joint_tokens))
            for _ in range(given.repeats)
        ]
        turns, joint = (statistics.median(pair[side].wall for pair in found) * 1e3 for side in (0, 1))
        ratios = [ratio_text([one[0][clock] / one[1][clock] for one in found]) for clock in (0, 1)]
        table.add_row(str(tokens), f"{turns:.1f}", f"{joint:.1f}", *ratios)
    console().print(table)


if __name__ == "__main__":
    main()
