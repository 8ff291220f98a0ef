"""`python -m benchmarks.prepare`: pairs per second beside `datasets.map`, and the most memory that any process of ours takes.

Writes synthetic pairs as JSON lines, prepares them on this machine's CPUs, and samples every process meanwhile. Memory is
private memory (resident minus shared): Ray maps its object store into every process, which counts only once. Ray is started
before the clock.

The peer is what TRL's `DPOTrainer` does with the same file: `load_dataset`, then `datasets.map` in as many processes, by TRL's
own functions, to the same token ids, in an Arrow cache. Ours finds duplicates and splits beside that. The two take turns.

With `--s3`, the same rows are also prepared in a bucket of an S3 server (moto's) on this machine, whose CPU time is part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from datasets import load_dataset
from rich.table import Table
from trl import DPOConfig, DPOTrainer

from benchmarks import common
from pipeline import prepare
from pipeline.config import parse_config
from pipeline.data.store import prepared_root
from pipeline.ray.session import init_ray
from strategies.models.tokenizer import load_tokenizer
from tests.s3 import bucket_of, start_shared

WORDS = "the of and to a in that it is was for on are with as his they at be this from have or by one had not but".split()
SAMPLE_EVERY_S = 0.3
OURS, IN_A_BUCKET, PEER = "ours", "ours, in a bucket", "datasets.map"


SHAPES: dict[str, dict[str, Any]] = {"plain": {}, "chat": {"type": "chat_template.argilla_chat"}}
"""Keys of the dataset by the shape of its rows."""
SEQUENCE_LEN = 4096


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=120, help="words of each text")
    parser.add_argument("--model", default=common.MODEL, help="whose tokenizer")
    parser.add_argument(
        "--shape", choices=list(SHAPES), default="plain", help="of the pairs: text, or turns for a chat template"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--s3", action="store_true", help="prepare in a bucket as well")
    options = parser.parse_args(arguments)
    common.quiet(os.cpu_count() or 1)
    watch = MemoryWatch()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = write_pairs(Path(folder) / "pairs.jsonl", options.pairs, options.words, options.shape)
        cfg = config_of(options, data, f"{folder}/prepared")
        tokenizer = load_tokenizer(cfg)
        began = time.perf_counter()
        init_ray(cfg)
        start = time.perf_counter() - began
        there = stack.enter_context(in_a_bucket(cfg, Path(folder))) if options.s3 else None
        seconds: dict[str, list[float]] = {OURS: [], **({IN_A_BUCKET: []} if options.s3 else {}), PEER: []}
        for number in range(options.rounds):
            with watch:
                seconds[OURS].append(common.timed(lambda: prepare_anew(cfg, tokenizer)).wall)
            if there is not None:
                seconds[IN_A_BUCKET].append(common.timed(lambda: prepare_anew(there, tokenizer)).wall)
            cache = Path(folder) / f"cache-{number}"
            seconds[PEER].append(common.timed(lambda cache=cache: map_with_trl(data, tokenizer, cache)).wall)
    console = common.console()
    console.print(rates_table(seconds, start, options))
    table = Table("process", "most private memory", title="highest first")
    for name, size in watch.peaks()[:6]:
        table.add_row(name, f"{size / 2**20:.0f} MiB")
    console.print(table)


def config_of(options: argparse.Namespace, data: Path, prepared: str) -> Any:
    """The recipe that prepares `data`."""
    keys = {"dataset_prepared_path": prepared, "val_set_size": 0.01, "dataset_exact_deduplication": True}
    datasets = [{"path": str(data), **SHAPES[options.shape]}]
    return parse_config({"base_model": options.model, "datasets": datasets, "sequence_len": SEQUENCE_LEN, **keys})


def prepare_anew(cfg: Any, tokenizer: Any) -> None:
    """Prepare, and remove the result, so that the next round has the same to do."""
    prepared = prepare(cfg, tokenizer)
    prepared_root(cfg.dataset_prepared_path).delete(prepared.fingerprint)


@contextmanager
def in_a_bucket(cfg: Any, folder: Path) -> Iterator[Any]:
    """The recipe with its prepared data in a bucket, whose server is a process of its own."""
    start_shared(folder)
    with bucket_of(folder) as bucket:
        yield cfg.model_copy(update={"dataset_prepared_path": bucket.uri("prepared")})


def map_with_trl(data: Path, tokenizer: Any, cache: Path) -> None:
    """What TRL's trainer does with its rows before it trains."""
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(cache))
    args = DPOConfig(
        output_dir=str(cache), max_length=SEQUENCE_LEN, dataset_num_proc=os.cpu_count(), bf16=False, use_cpu=True, report_to=[]
    )
    DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


def rates_table(seconds: dict[str, list[float]], start: float, options: argparse.Namespace) -> Table:
    """Seconds and pairs per second of both."""
    table = Table("", "s", "pairs/s", title=f"{options.pairs:,} pairs of {3 * options.words} words, {options.shape}")
    for name, values in seconds.items():
        median = statistics.median(values)
        table.add_row(name, ", ".join(f"{value:.1f}" for value in values), f"{options.pairs / median:,.0f}")
    ratios = [peer / own for own, peer in zip(seconds[OURS], seconds[PEER], strict=True)]
    there = [own / remote for own, remote in zip(seconds[OURS], seconds.get(IN_A_BUCKET, []), strict=False)]
    in_bucket = f"in a bucket, of a path's: {common.ratio_text(there)}; " if there else ""
    table.caption = (
        f"pairs/s of datasets.map's: {common.ratio_text(ratios)}; {in_bucket}Ray's start, not counted, {start:.1f} s\n"
        f"{common.machine(os.cpu_count() or 1)}"
    )
    return table


def write_pairs(path: Path, number: int, words: int, shape: str) -> Path:
    """Write `number` pairs of random words, the same for the same arguments."""
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(number):
            prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=words)) for _ in range(3))
            row: dict[str, Any] = {"prompt": f"{index} {prompt}", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(SPELLED[shape](row)) + "\n")
    return path


def as_turns(row: dict[str, str]) -> dict[str, Any]:
    """A pair as conversations, which both sides read: TRL takes the turns that they share for the prompt."""
    turns = [{"role": "user", "content": row["prompt"]}]
    return {name: [*turns, {"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}


SPELLED: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {"plain": dict, "chat": as_turns}


class MemoryWatch:
    """Samples the private memory of this process and its descendants while it is open."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, str], int] = defaultdict(int)

    def __enter__(self) -> MemoryWatch:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def peaks(self) -> list[tuple[str, int]]:
        """(name, bytes) of every process, the largest first."""
        return sorted(((name, size) for (_, name), size in self._peaks.items()), key=lambda peak: -peak[1])

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._done.wait(SAMPLE_EVERY_S):
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory, name = process.memory_info(), "driver" if process == me else process.name()
                except psutil.NoSuchProcess:
                    continue
                key = (process.pid, name)
                self._peaks[key] = max(self._peaks[key], memory.rss - memory.shared)


if __name__ == "__main__":
    main()
