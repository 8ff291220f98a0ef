"""`python -m benchmarks.sharding_memory`: what each worker holds of a model under DDP, ZeRO-1, 2 and 3, and FSDP2.

A Llama of random weights takes a few steps of packed pairs in processes of their own, connected by gloo. Counted are the bytes
of all tensors that one worker holds at the moment when the optimizer steps, each storage once: weights; gradients, DeepSpeed's
copies of them among those; what the optimizer keeps, DeepSpeed's float32 copy of the weights included; and every other tensor.
What torch's DDP holds where Python doesn't see it, buckets as large as all gradients, is not counted, so the ratios, which are
to DDP, are rather too high. Beside it stands what the process's resident memory has grown by since before the model was loaded,
which has all else in it: activations, buffers of the engine, and code that it compiled.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks import common
from benchmarks.processes import free_port, spawn
from cluster.config import ClusterKeys
from cluster.sharding import sharding_arguments
from strategies import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.models.loading import load_model
from strategies.models.sharding import zero3_init_context
from strategies.models.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer

ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "ZeRO-1": {"deepspeed": "zero1"},
    "ZeRO-2": {"deepspeed": "zero2"},
    "ZeRO-3": {"deepspeed": "zero3"},
    "FSDP2": {"fsdp_config": {}},
}
COUNTED = ("weights", "gradients", "optimizer", "other")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512, help="of the model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=128, help="of a sequence")
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        parameters = _save_model(options, f"{folder}/model")
        found = {name: _measure(name, options, folder) for name in ENGINES}
    console = common.console()
    console.print(_table(found, options, parameters))
    console.print(f"({common.machine(1)})")


def _save_model(options: argparse.Namespace, folder: str) -> int:
    """Write a model of random weights, with any tokenizer: the rows are random ids. Returns its number of parameters."""
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64 or 1,
        num_key_value_heads=options.width // 64 or 1,
        vocab_size=options.vocabulary,
        max_position_embeddings=2 * options.tokens,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.num_parameters()


def _measure(name: str, options: argparse.Namespace, folder: str) -> dict[str, int]:
    """Bytes of rank 0, in processes that have done nothing but import what they need."""
    spawn(worker, options.workers, options, name, free_port(), folder)
    return json.loads(Path(folder, "found.json").read_text())


def worker(rank: int, options: argparse.Namespace, name: str, port: int, folder: str) -> None:
    """Train in one of the processes; rank 0 leaves `found.json`."""
    world = str(options.workers)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    common.quiet(1)
    cfg = as_config(
        {
            "base_model": f"{folder}/model",
            "rl": "simpo",
            "micro_batch_size": 2,
            "max_steps": options.steps,
            "sequence_len": options.tokens,
            "save_strategy": "no",
            "bf16": False,
            "output_dir": f"{folder}/{name}",
        }
    )
    sharding = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": options.workers}, **ENGINES[name]}))
    tokenizer = load_tokenizer(cfg)
    before = psutil.Process().memory_info().rss
    with zero3_init_context(cfg, sharding):
        model = load_model(cfg, tokenizer)
    builder = HFRLTrainerBuilder(cfg, model, tokenizer)
    del model
    builder.train_dataset = _rows(options)
    builder.extra_arguments = sharding
    builder.callbacks = [counter := _Counter()]
    trainer = builder.build()
    counter.trainer = trainer
    trainer.train()
    if rank == 0:
        resident = psutil.Process().memory_info().rss - before
        Path(folder, "found.json").write_text(json.dumps({**counter.found, "resident": resident}))
    # No orderly end: gloo's threads have aborted the process, and waited for ever, where one rank was quicker than the other.
    sys.stdout.flush()
    os._exit(0)


def _rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Pairs of random ids, for one epoch of the steps."""
    generator = torch.Generator().manual_seed(0)
    length = options.tokens // 2

    def ids() -> list[int]:
        return torch.randint(options.vocabulary, (length,), generator=generator).tolist()

    number = 2 * options.workers * options.steps
    return [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(number)]


class _Counter(TrainerCallback):
    """Counts at each step of the innermost optimizer; the step that holds the most stays."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.found: dict[str, int] = {}
        self.stage3: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch the optimizer that the engines have wrapped."""
        optimizer = self.trainer.optimizer
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
            if hasattr(optimizer, "grad_partitions_flat_buffer"):
                self.stage3 = optimizer
        optimizer.register_step_pre_hook(self._count)

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        parameters = list(model.parameters())
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        weights = [part for parameter in parameters for part in (parameter, getattr(parameter, "ds_tensor", None))]
        gradients = [tensor.grad for tensor in [*parameters, *stepped]]
        if self.stage3 is not None:
            # It adds gradients up in a buffer, and steps group by group, on a flat copy of the group's: the `grad` above.
            gradients.append(self.stage3.grad_partitions_flat_buffer)
            stepped = self.stage3.fp32_partitioned_groups_flat
        seen: set[int] = set()
        parts = zip(COUNTED, (weights, gradients, [*states, *stepped], _alive()), strict=True)
        counted = {name: _bytes(tensors, seen) for name, tensors in parts}
        if sum(counted.values()) > sum(self.found.values()):
            self.found = counted


def _alive() -> list[torch.Tensor]:
    """Every tensor of this process that Python knows of."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and found.device.type != "meta"]


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Of the storages of tensors, those left out that were seen before."""
    total = 0
    for tensor in tensors:
        if tensor is None:
            continue
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _table(found: dict[str, dict[str, int]], options: argparse.Namespace, parameters: int) -> Table:
    title = f"MiB of one of {options.workers} workers when the optimizer steps; {parameters / 1e6:.1f} million parameters, fp32"
    table = Table("", *COUNTED, "together", "to DDP", "resident memory", "to DDP", title=title, title_justify="left")
    base = found["DDP"]
    for name, held in found.items():
        total, whole = (sum(one[part] for part in COUNTED) for one in (held, base))
        resident = (_mib(held["resident"]), f"{held['resident'] / base['resident']:.2f}x")
        table.add_row(name, *(_mib(held[part]) for part in COUNTED), _mib(total), f"{total / whole:.2f}x", *resident)
    return table


def _mib(number: int) -> str:
    return f"{number / 2**20:.1f}"


if __name__ == "__main__":
    main()
