"""`python -m benchmarks.slots`: what one more trial on a shared base costs: seconds until its first step, and memory.

Each number of slots runs in a process of its own: trials of one LoRA recipe with other seeds, all at once, two steps each.
Seconds and memory are those of a process that has imported everything, as a worker has.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.table import Table
from transformers import TrainerCallback, set_seed

from benchmarks.common import Row, Times, console, load, load_rows, machine, parser, quiet
from strategies.builder import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.slots import Attach, Close, Ended, SharedBase, Slot, SlotHost

__all__ = ["main"]

MIB = 2**20
STEPS = 2


class Measured(NamedTuple):
    """Of one process."""

    base: int
    """Bytes of the base's weights."""
    memory: int
    """Most private bytes of the process between rounds of turns."""
    peak: int
    """Most resident bytes, activations included."""
    starts: list[Times]
    """Of each trial, from its first turn to its first step."""


class Started(TrainerCallback):
    """Notes when the first step begins."""

    def __init__(self, began: Times, starts: list[Times]) -> None:
        self.began, self.starts = began, starts

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The rows' order is drawn and the first step follows."""
        self.starts.append(Times.now().since(self.began))


def measure(options: argparse.Namespace, slots: int) -> Measured:
    """Run so many trials at once."""
    quiet(options.threads)
    model, tokenizer = load(options)
    rows = load_rows(options, tokenizer, STEPS * options.batch)
    base = SharedBase(model)
    process, starts, memory = psutil.Process(), [], 0
    numbers = itertools.count()

    def run_trial(slot: Slot) -> None:
        began = Times.now()
        cfg = as_config(recipe(options, slot.payload, folder))
        set_seed(cfg.seed)
        builder = HFRLTrainerBuilder(cfg, slot.new_model(), tokenizer)
        builder.train_dataset = rows
        builder.callbacks.append(Started(began, starts))
        trainer = builder.build()
        slot.join(trainer)
        trainer.train()

    def next_commands(host: SlotHost) -> Sequence[Attach | Close]:
        nonlocal memory
        gc.collect()
        memory = max(memory, process.memory_full_info().uss)
        # The first one alone: what it imports and allocates for good is no other's cost.
        number = next(numbers)
        if number >= 2:
            return [Close()]
        return [Attach(str(seed), seed) for seed in (range(1, slots) if number else [0])]

    def on_end(ended: Ended) -> None:
        if ended.error is not None:
            raise RuntimeError(ended.traceback)

    with tempfile.TemporaryDirectory() as folder:
        SlotHost(base, run_trial, slots).run(next_commands, on_end)
    return Measured(base.nbytes, memory, peak_bytes(), starts)


def recipe(options: argparse.Namespace, seed: int, folder: str) -> Row:
    """A trial's."""
    return {
        "base_model": options.model,
        "rl": "dpo",
        "adapter": "lora",
        "lora_r": options.rank,
        "seed": seed,
        "micro_batch_size": options.batch,
        "sequence_len": options.sequence_len,
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": options.bf16,
        "output_dir": str(Path(folder, str(seed))),
    }


def peak_bytes() -> int:
    """Most resident bytes of this process until now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    options = parser("slots", __doc__)
    options.add_argument(
        "--slots", type=int, nargs="+", default=[1, 8], help="numbers of trials at once; the first is compared with"
    )
    options.add_argument("--rank", type=int, default=8, help="of the adapters")
    given = options.parse_args(arguments)
    title = f"trials on one base, LoRA r {given.rank}, {given.batch} pairs a step; {machine(given.threads)}"
    names = ("slots", "base MiB", "memory MiB", "", "peak MiB", "", "first start s", "one more s", "its CPU s")
    table, first = Table(*names, title=title), None
    for slots in given.slots:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (given, slots))
        first = first or found
        more = sorted(found.starts[1:])[len(found.starts) // 2 - 1 :][:1]
        table.add_row(
            str(slots),
            f"{found.base / MIB:,.0f}",
            *(f"{found.memory / MIB:,.0f}", f"{found.memory / first.memory:.2f}x"),
            *(f"{found.peak / MIB:,.0f}", f"{found.peak / first.peak:.2f}x"),
            f"{found.starts[0].wall:.2f}",
            *((f"{more[0].wall:.2f}", f"{more[0].cpu:.2f}") if more else ("", "")),
        )
    console().print(table)


if __name__ == "__main__":
    main()
