"""`python -m benchmarks.plan_at_scale`: what the batch plan costs, and how well it balances, from 8 to 4,096 workers.

Cuts global batches into every worker's forwards, as each worker does at every step; nothing is trained, and no Ray is needed.
Lengths are those of the real pairs beside the repository, where they and the tokenizer are there, drawn with replacement, and
log-normal ones. Packed forwards take twice `--sequence-len` tokens, padded ones `--micro-batch` pairs.

* imbalance: tokens of the worker with the most, over those of the mean one, padding included. What DDP waits for at the end of
  a step: 1.10 means that the mean worker is idle for 9 % of it.
* in lockstep: the same where workers wait for each other in every forward, as ZeRO-3 and FSDP2 do.
* empty: share of forwards that have no pair of their own, and only keep the number of forwards equal.
* ms: processor time of planning one step; every worker plans for itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import common, lengths
from strategies.batch.plan import BatchPlan, Forward, assign_forwards, packed_tokens

WORKERS = (8, 64, 256, 1024, 4096)
SIGMAS = (lengths.SIGMA, 1.2)
REAL = ("dpo_en_demo.json", "dpo_zh_demo.json")


@dataclass(frozen=True)
class Record:
    """Of one distribution, number of workers and kind of forward, the mean over steps; of the time, the median."""

    distribution: str
    workers: int
    pairs: int
    """Of a global batch."""
    packed: bool
    forwards: float
    """Of each worker."""
    imbalance: float
    in_lockstep: float
    empty: float
    milliseconds: float


def main(arguments: list[str] | None = None) -> None:
    """Simulate and print."""
    options = parse(arguments)
    common.quiet(1)
    distributions, missing = find_distributions(options)
    records = [
        measured(name, found, workers, each * workers, packed, options)
        for name, found in distributions.items()
        for workers in options.workers
        for each in options.pairs_per_worker
        for packed in (True, False)
    ]
    if options.json:
        print(json.dumps({"notes": missing, "records": [asdict(record) for record in records]}))
        return
    console = common.console()
    for name, found in distributions.items():
        console.print(table(name, found, [record for record in records if record.distribution == name], options))
    for note in [*missing, common.machine(1)]:
        console.print(note)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_at_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument("--pairs-per-worker", type=int, nargs="+", default=[1, 4, 16], help="of a global batch")
    parser.add_argument("--sequence-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=2, help="pairs of a padded forward")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data", type=Path, default=common.DATA.parent, help=f"folder of {' and '.join(REAL)}")
    parser.add_argument("--model", default=common.MODEL, help="whose tokenizer")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser.parse_args(arguments)


def find_distributions(options: argparse.Namespace) -> tuple[dict[str, lengths.Lengths], list[str]]:
    """Return lengths by the name of their distribution, and a note for each one that can't be had."""
    found, missing = {}, []
    for name in REAL:
        file = options.data / name
        try:
            found[name] = lengths.real(file, options.model)
        # What a missing file and a missing tokenizer raise.
        except (OSError, ValueError) as error:
            missing.append(f"without {name}: {error}")
    most = max(options.workers) * max(options.pairs_per_worker) * options.steps
    for sigma in SIGMAS:
        found[f"log-normal, sigma {sigma}"] = lengths.log_normal(most, sigma=sigma)
    return found, missing


def measured(name: str, found: lengths.Lengths, workers: int, pairs: int, packed: bool, options: argparse.Namespace) -> Record:
    """Plan `--steps` global batches of so many pairs."""
    rows = found[np.random.default_rng(0).integers(len(found), size=pairs * options.steps)]
    tokens = packed_tokens(rows, options.sequence_len)
    fits = (2 * options.sequence_len, None) if packed else (sys.maxsize, options.micro_batch)
    plan = BatchPlan(len(rows), pairs, seed=0)
    plan.order(0)  # once an epoch, not at every step
    balances, seconds = [], []
    for step in range(options.steps):
        began = time.process_time()
        members = plan.members(0, step)
        shares = assign_forwards(tokens[members].tolist(), workers, *fits)
        seconds.append(time.process_time() - began)
        balances.append(balance(shares, fed_tokens(shares, rows[members], packed, options.sequence_len)))
    forwards, imbalance, in_lockstep, empty = (statistics.mean(values) for values in zip(*balances, strict=True))
    return Record(name, workers, pairs, packed, forwards, imbalance, in_lockstep, empty, 1000 * statistics.median(seconds))


def fed_tokens(shares: list[list[Forward]], rows: lengths.Lengths, packed: bool, limit: int) -> NDArray[np.int64]:
    """Return the tokens that every worker's forwards compute, padding included, shape (workers, forwards)."""
    if packed:
        each = packed_tokens(rows, limit)
        # An empty forward runs the shortest pair.
        return np.array([[each[forward or [each.argmin()]].sum() for forward in share] for share in shares])
    longest = np.minimum(rows[:, 0] + rows[:, 1:].max(axis=1), limit)
    shortest = packed_tokens(rows, limit).argmin()
    return np.array(
        [[2 * max(1, len(forward)) * longest[forward or [shortest]].max() for forward in share] for share in shares]
    )


def balance(shares: list[list[Forward]], tokens: NDArray[np.int64]) -> tuple[int, float, float, float]:
    """Return the forwards of a worker, both imbalances, and the share of empty forwards."""
    mean = tokens.sum(axis=1).mean()
    empty = statistics.mean(not forward for share in shares for forward in share)
    return tokens.shape[1], tokens.sum(axis=1).max() / mean, tokens.max(axis=0).sum() / mean, empty


def table(name: str, found: lengths.Lengths, records: list[Record], options: argparse.Namespace) -> Table:
    """Draw the records of one distribution."""
    sizes = found.sum(axis=1)
    spread = np.log(sizes).std()
    title = f"{name}: {sizes.mean():.0f} tokens a pair, log-deviation {spread:.2f}, longest {sizes.max():,}"
    columns = ("workers", "pairs a step", "forwards", "", "imbalance", "in lockstep", "empty", "ms")
    drawn = Table(*columns, title=title)
    packed = f"packed, {2 * options.sequence_len:,} tokens"
    padded = f"padded, {options.micro_batch} pairs"
    for record in records:
        drawn.add_row(
            f"{record.workers:,}",
            f"{record.pairs:,}",
            f"{record.forwards:.1f}",
            packed if record.packed else padded,
            f"{record.imbalance:.2f}",
            f"{record.in_lockstep:.2f}",
            f"{record.empty:.1%}",
            f"{record.milliseconds:.1f}",
        )
    return drawn


if __name__ == "__main__":
    main()
