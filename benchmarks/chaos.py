"""`python -m benchmarks.chaos`: a run whose workers are killed at random moments, beside one that nothing happens to.

A tiny model is trained twice on Ray with two workers. The second time, at moments that `--seed` draws, a worker that is drawn
too gets SIGKILL: while it trains, evaluates, or saves. At the end the weights of both runs are compared bit for bit, and the
ledger is checked: every pair once per epoch. Printed for each kill: how many steps were repeated, and how long it took from
the signal until a step was trained again.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import ray
import torch
from rich.table import Table
from safetensors.torch import load_file

from benchmarks import common
from pipeline import train
from pipeline.config import RunConfig, parse_config
from pipeline.runs.metrics import MetricsFile
from pipeline.ui.display import SilentDisplay
from tests.tiny import pairs, save_tiny

RESTARTS = "restarting from "
REPEATED = re.compile(r"(?:continuing from the checkpoint of step \d+|starting again): (\d+) steps? (?:is|are) repeated")
SHARDINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": "zero1"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp2": {"fsdp_config": {"fsdp_version": 2}},
}


@dataclass
class Kill:
    """One SIGKILL and what came of it."""

    rank: int
    after_step: int
    at: float
    repeated: int | None = None
    """Steps; unknown until the run restarts."""
    seconds: float | None = None
    """From the signal until a step was trained again."""


@dataclass
class Observer(SilentDisplay):
    """Knows where the run stands, and when it came back."""

    kills: list[Kill] = field(default_factory=list)
    step: int = 0
    trains: threading.Event = field(default_factory=threading.Event)

    def note(self, text: str) -> None:
        if not self.kills:
            return
        if text.startswith(RESTARTS):
            self.kills[-1].repeated = 0
        elif found := REPEATED.match(text):
            self.kills[-1].repeated = int(found.group(1))

    def record(self, record: dict[str, Any]) -> None:
        self.step = record["step"]
        if self.kills and self.kills[-1].seconds is None:
            if self.kills[-1].repeated is None:
                return  # a record of the time before
            self.kills[-1].seconds = time.time() - self.kills[-1].at
        self.trains.set()


def main(arguments: list[str] | None = None) -> None:
    """Run, kill, compare, print."""
    options = parser().parse_args(arguments)
    common.quiet(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options, Path(folder))
        ray.shutdown()
        report(options, outcome)


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--sharding", choices=list(SHARDINGS), default="ddp")
    parser.add_argument("--steps", type=int, help="of the run; 75 for each kill when not given")
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--longest-pause", type=float, default=4.0, help="seconds of training before a kill, at most")
    return parser


@dataclass
class Outcome:
    """Of both runs."""

    kills: list[Kill]
    same_weights: bool
    ledger: str
    """What is wrong with it, empty when nothing is."""


def run(options: argparse.Namespace, folder: Path) -> Outcome:
    """Both runs."""
    steps = options.steps or 75 * options.kills
    quiet = train(recipe(options, folder, "quiet", steps))
    observer, ended = Observer(), threading.Event()
    killer = threading.Thread(target=kill_at_random, args=(options, observer, ended), daemon=True)
    killer.start()
    killed = train(recipe(options, folder, "killed", steps), display=observer)
    ended.set()
    killer.join()
    mine, theirs = (load_file(Path(result.model_dir) / "model.safetensors") for result in (killed, quiet))
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return Outcome(observer.kills, same, ledger_problem(folder / "killed" / "ledger.jsonl", steps))


def recipe(options: argparse.Namespace, folder: Path, name: str, steps: int) -> RunConfig:
    """A run of the tiny model."""
    data, model = folder / "pairs.jsonl", folder / "model"
    if not data.exists():
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs(72)))
        save_tiny(model)
    return parse_config(
        {
            "base_model": str(model),
            "datasets": [{"path": str(data)}],
            "val_set_size": 8,
            "dataset_prepared_path": str(folder / "prepared"),
            "sequence_len": 256,
            "learning_rate": 1e-4,
            "micro_batch_size": 4,
            "max_steps": steps,
            "logging_steps": 5,
            "eval_steps": 2 * options.save_steps,
            "save_steps": options.save_steps,
            "output_dir": str(folder / name),
            "ray": {"num_workers": 2, "max_failures": options.kills + 5},
            **SHARDINGS[options.sharding],
        }
    )


def kill_at_random(options: argparse.Namespace, observer: Observer, ended: threading.Event) -> None:
    """Wait until the run trains, then a random time, then kill a random worker; again and again."""
    random = Random(options.seed)
    while len(observer.kills) < options.kills and not ended.is_set():
        if not observer.trains.wait(timeout=1):
            continue
        if ended.wait(random.uniform(0, options.longest_pause)):
            return
        workers = training_workers()
        if not workers:
            continue
        rank = random.randrange(len(workers))
        observer.trains.clear()
        observer.kills.append(Kill(rank, observer.step, time.time()))
        workers[rank].send_signal(signal.SIGKILL)


def training_workers() -> list[psutil.Process]:
    """The training workers of this process's Ray that haven't ended. Their name is cut to 15 characters."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            # A zombie has ended; only its parent, Ray's node, hasn't noticed yet.
            if child.name().startswith("ray::RayTrainWo") and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def ledger_problem(path: Path, steps: int) -> str:
    """What shows in the ledger that a pair was repeated or left out."""
    entries = MetricsFile(path).read()
    if [entry["step"] for entry in entries] != list(range(1, steps + 1)):
        return f"{len(entries)} steps are in the ledger, not {steps}"
    rows = sorted({row for entry in entries for row in entry["row_ids"]})
    per_epoch = -(-len(rows) // 8)
    for start in range(0, steps - per_epoch + 1, per_epoch):
        counts = Counter(row for entry in entries[start : start + per_epoch] for row in entry["row_ids"])
        if sorted(counts) != rows or set(counts.values()) != {1}:
            return f"the epoch from step {start + 1} on has not every pair once"
    return ""


def report(options: argparse.Namespace, outcome: Outcome) -> None:
    """Print the table and the verdicts."""
    table = Table(
        "kill", "rank", "last step seen", "repeated steps", "s until training again", title=f"chaos, {options.sharding}"
    )
    for number, kill in enumerate(outcome.kills, start=1):
        seconds = "-" if kill.seconds is None else f"{kill.seconds:.1f}"
        table.add_row(str(number), str(kill.rank), str(kill.after_step), str(kill.repeated), seconds)
    seconds = [kill.seconds for kill in outcome.kills if kill.seconds is not None]
    repeated = [kill.repeated for kill in outcome.kills if kill.repeated is not None]
    verdicts = [
        f"weights {'bit-identical to' if outcome.same_weights else 'DIFFERENT from'} the quiet run's",
        f"ledger: {outcome.ledger or 'every pair once per epoch, every step once'}",
        f"repeated at most {max(repeated, default=0)} steps (saves every {options.save_steps})",
    ]
    if seconds:
        verdicts.append(f"back after {statistics.median(seconds):.1f} s ({min(seconds):.1f}..{max(seconds):.1f})")
    table.caption = "\n".join([*verdicts, common.machine(1)])
    common.console().print(table)
    kept = len(outcome.kills) == options.kills and max(repeated, default=0) <= options.save_steps
    if not outcome.same_weights or outcome.ledger or not kept:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
