"""How much memory a training worker takes, and whether a machine has it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.sharding import sharding_of
from pipeline.config.paths import absolute_paths
from pipeline.data.preparation import find_prepared
from pipeline.doctor.checks import Check
from pipeline.doctor.machine import Machine, machine_memory
from pipeline.errors import RunFailed, UserError
from pipeline.io.cache import NodeCache
from pipeline.io.remote_models import fetch_models, find_models
from pipeline.planning import row_bytes
from strategies import memory
from strategies.memory.worst_case import longest_pair
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from strategies.memory import Measured, MemoryEstimate

__all__ = ["Diagnosis", "Room", "check_rows", "diagnose", "this_machine", "usable", "verdict"]

HELD_PER_ROW = 48
"""Bytes of a worker's own memory: the lengths of a row's texts, its tokens in a packed row, its place in the order."""


def check_rows(cfg: RunConfig) -> tuple[Check, int]:
    """Return the check of the rows, and the bytes that each worker holds for them; 0 where they aren't prepared."""
    try:
        prepared = find_prepared(cfg)
    except UserError as error:
        return Check("rows", "warn", f"not known: {error}"), 0
    if prepared is None:
        return Check("rows", "pass", "not prepared yet; after `prefray prepare` this counts what a node keeps of them"), 0
    size, tokens = row_bytes(cfg, prepared)
    rows = prepared.train_rows + prepared.eval_rows
    shown = f"{size / 2**20:,.0f} MiB" if size >= 2**20 else "less than a MiB"
    cache = NodeCache.of(cfg.ray)
    finding = f"{rows:,} with {tokens:,} tokens: {shown} on the disk of each node, in {cache.root}, which its workers share"
    is_too_much = cache.limit is not None and size > cache.limit
    advice = f"; ray.cache_size allows {cfg.ray.cache_size}: set more" if is_too_much else ""
    return Check("rows", "fail" if is_too_much else "pass", finding + advice), rows * HELD_PER_ROW


USABLE = {"CPU": 0.95, "GPU": 0.97}
"""Part of the memory that workers may fill: from 95 % of a machine's on, Ray ends them."""
RAY = ("ray.train", "ray.data")
"""What a worker has loaded beside `strategies`."""
STEADY = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
"""Variables of glibc, each of which keeps it from raising the size from which freed memory goes back at once."""


@dataclass(frozen=True)
class Room:
    """What workers are put into."""

    machine: Machine
    workers: int
    """That share the machine's memory; 1 on GPUs."""
    name: str = "this machine"


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    checks: tuple[Check, ...]
    estimate: MemoryEstimate
    room: Room
    measured: Measured | None = None

    @property
    def needed(self) -> int:
        """Bytes that all workers need of the machine, or one of its GPU."""
        return self.room.workers * self.estimate.total

    @property
    def fits(self) -> bool:
        """Whether nothing is in the way of a run."""
        return self.needed <= usable(self.room.machine) and all(check.status != "fail" for check in self.checks)


def usable(machine: Machine) -> int:
    """Bytes that workers may fill."""
    return int(machine.total * USABLE[machine.kind])


def diagnose(cfg: RunConfig, room: Room | None = None, *, with_measurement: bool = False) -> Diagnosis:
    """Look at a recipe and at a machine; no weights are loaded unless the memory is to be measured.

    Args:
        cfg: the recipe.
        room: where the workers will be; all of them on this machine when None.
        with_measurement: train two steps of the largest forwards in a process of its own.

    Raises:
        UserError: for a recipe that can't be trained, whatever the machine.
        RunFailed: when the measured process ended early.
    """
    cfg = absolute_paths(cfg)
    fetch_models(cfg)
    if with_measurement:
        find_models(cfg).bring()
    if room is None:
        machine = this_machine(cfg.ray.use_gpu)
        is_gpu = machine.kind == "GPU"
        room = Room(machine, 1 if is_gpu else cfg.num_workers, "each GPU" if is_gpu else "this machine")
    sharding = sharding_of(cfg)
    workers = cfg.num_workers if sharding is None else cfg.min_workers  # the fewest hold the most of a divided model
    try:
        found = memory.estimate(cfg, workers, room.machine.kind == "GPU", sharding)
        # In a process of its own: what this one has loaded would count.
        measured = memory.measure_peak(cfg, RAY) if with_measurement else None
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise RunFailed(str(error)) from error
    notes = (Check("estimate", "warn", note) for note in found.notes)
    rows, size = check_rows(cfg)
    checks = (*_checks(cfg, found), rows, *_allocator(room.machine), *notes)
    # These stay in main memory, and take none of a GPU's.
    if room.machine.kind == "CPU":
        found = replace(found, rows=size)
    return Diagnosis(checks, found, room, measured)


def _checks(cfg: RunConfig, estimate: MemoryEstimate) -> Iterator[Check]:
    forward = estimate.forward
    strategy = get_strategy(cfg.rl)
    if forward.packed:
        longest = longest_pair(cfg)
        yield Check("batches", "pass", f"packed rows of at most {cfg.tokens_per_forward or 2 * cfg.sequence_len} tokens")
        if forward.tokens < longest:
            finding = (
                f"two sequences of sequence_len: {cfg.sequence_len} make a pair of {longest} tokens, more than a forward "
                "takes; if your data have such pairs, training refuses them"
            )
            yield Check("tokens_per_forward", "warn", finding)
        else:
            yield Check("longest pair", "pass", f"{longest} tokens at sequence_len: {cfg.sequence_len}")
    else:
        what = "pairs" if strategy.batch_kind == "pair" else "rows"
        finding = f"padded, {forward.pairs} {what} of sequence_len: {cfg.sequence_len}, {forward.tokens} tokens a forward"
        because = f", not packed: {forward.padded_because}" if forward.padded_because else ""
        yield Check("batches", "warn" if because else "pass", finding + because)
    if strategy.batch_kind == "prompt":
        yield Check("generation", "warn", "what generating takes (its key-value cache) is not part of the estimate")
    yield Check("reference", "pass", _REFERENCES[strategy.reference_mode(cfg)])
    if (sharding := sharding_of(cfg)) is not None:
        finding = f"{sharding} divides {_DIVIDED[sharding]} among {cfg.min_workers} workers; its buffers are not counted"
        yield Check("sharding", "warn", finding)


def _allocator(machine: Machine) -> Iterator[Check]:
    # On GPUs torch has an allocator of its own.
    if machine.kind == "CPU" and not any(os.environ.get(name) for name in STEADY):
        finding = (
            "glibc's defaults keep freed tensors for later, and a process can grow to twice the total below; "
            f"{STEADY[0]}=1000000 in the environment of Ray prevents it"
        )
        yield Check("allocator", "warn", finding)


_DIVIDED = {
    **dict.fromkeys(("zero1", "zero2"), "the optimizer's state"),
    **dict.fromkeys(("zero3", "fsdp2"), "weights, gradients and the optimizer's state"),
}
_REFERENCES = {
    None: "none, the method compares with no reference",
    "cached": "cached: scored before training, no reference model in memory",
    "live": "live: the reference answers beside the policy",
}


def verdict(cfg: RunConfig, found: Diagnosis) -> str:
    """Say if the run fits, and if not, what to change, what saves most first."""
    machine, sharing = found.room.machine, found.room.workers
    where = "a GPU" if machine.kind == "GPU" else found.room.name
    workers = f"{sharing} workers of {_gib(found.estimate.total)} each" if sharing > 1 else "a worker"
    need = f"{workers} need{'s' * (sharing == 1)} {_gib(found.needed)}, and {where} has {_gib(machine.total)}"
    if found.needed > usable(machine):
        return f"doesn't fit: {need}; {_remedies(cfg, found)}"
    # Not a failure: other programs may end before the run begins.
    if found.needed > machine.free:
        return f"fits, once others make room: {need}, of which {_gib(machine.free)} are free now"
    return f"fits: {need}"


def _remedies(cfg: RunConfig, found: Diagnosis) -> str:
    estimate = found.estimate
    packed, tokens = estimate.forward.packed, estimate.forward.tokens
    worked = estimate.activations + estimate.token_head
    state = estimate.gradients + estimate.optimizer + estimate.buckets
    # What it would touch, in bytes; words; whether it is there to be done.
    choices = [
        (found.needed - estimate.total, "fewer workers per node (ray.num_workers)", found.room.workers > 1),
        (state, "adapter: lora", cfg.adapter is None),
        (worked, "gradient_checkpointing: true", not cfg.gradient_checkpointing),
        (worked, f"a lower tokens_per_forward (now {tokens})", packed),
        (worked, "a lower micro_batch_size", not packed and cfg.micro_batch_size > 1),
        (worked, "a lower sequence_len", True),
        (estimate.reference, "reference: cached", "reference" in get_strategy(cfg.rl).keys),
    ]
    # A stable sort: remedies of equal effect keep the order above.
    ordered = sorted(choices, key=lambda choice: -choice[0])
    return "try, what saves most first: " + ", ".join(words for size, words, possible in ordered if size and possible)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


def this_machine(use_gpu: bool | str = "auto") -> Machine:
    """Memory of this machine, or of its smallest GPU where workers use one."""
    import torch

    if use_gpu is not False and torch.cuda.is_available():
        each = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return Machine("GPU", min(total for _, total in each), min(free for free, _ in each))
    return machine_memory()
