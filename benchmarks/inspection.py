"""`python -m benchmarks.inspection`: seconds and memory of `inspect` on scored pairs, its page included.

Writes a store and scores of random tokens, as `prepare` and `score` leave them, and inspects them, Ray's start included. Memory
is that of the driver, of Ray's workers and of the process that they are forked from, at its highest; pages that several of them
share count once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import common
from pipeline import inspect, write_inspection
from pipeline.config import parse_config
from pipeline.data.plan import make_plan
from pipeline.data.preparation import PART_ROWS
from pipeline.data.store import CHECKSUM, MANIFEST, Prepared, checksum, open_store, prepared_root
from pipeline.io.digests import written
from pipeline.reference.plan import make_plan as make_score_plan
from pipeline.reference.precision import resolve_precision
from pipeline.reference.score_files import write_scores
from strategies.models.tokenizer import load_tokenizer

SAMPLE_EVERY_S = 0.5
NAMES = ("prompt", "chosen", "rejected")


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection", description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=90, help="of each text on average")
    parser.add_argument("--model", default=common.MODEL)
    parser.add_argument("--against", action="store_true", help="look for a benchmark's 8-grams too")
    options = parser.parse_args(arguments)
    common.quiet(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = recipe(options.model, Path(folder))
        write_scored(cfg, write_store(cfg, options.pairs, options.tokens))
        words = " ".join(np.random.default_rng(1).choice(WORDS, 20_000))
        (Path(folder) / "benchmark.txt").write_text(words)
        peak = Peak()
        begin = time.perf_counter()
        with peak:
            found = inspect(cfg, [f"{folder}/benchmark.txt"] if options.against else [])
            inspected = time.perf_counter() - begin
            write_inspection(found, cfg)
        seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        again = inspect(cfg, [f"{folder}/benchmark.txt"] if options.against else [])
        cached = time.perf_counter() - begin
        assert again.table.equals(found.table)
    print(f"{options.pairs:,} scored pairs of 3 x {options.tokens} tokens, {common.machine(os.cpu_count() or 1)}")
    print(f"inspected in {inspected:.1f} s, with the page {seconds:.1f} s; from cached columns {cached:.1f} s")
    print(f"memory: driver {peak.driver / 2**20:,.0f} MiB, with Ray's workers {peak.total / 2**20:,.0f} MiB")


WORDS = "the of and to a in that it is was for on are with as his they at be this from have or by one had not but".split()


def recipe(model: str, folder: Path) -> Any:
    """A recipe; its rows aren't read, since their store is there."""
    (folder / "rows.jsonl").write_text(json.dumps(dict.fromkeys(NAMES, "text")) + "\n")
    keys = {"dataset_prepared_path": str(folder / "prepared"), "sequence_len": 4096, "bf16": False}
    return parse_config({"base_model": model, "datasets": [{"path": str(folder / "rows.jsonl")}], **keys})


def write_store(cfg: Any, pairs: int, tokens: int) -> Prepared:
    """Write random pairs as the prepared store of the recipe."""
    tokenizer, rng = load_tokenizer(cfg), np.random.default_rng(0)
    plan = make_plan(cfg, tokenizer, PART_ROWS)
    folder = prepared_root(cfg.dataset_prepared_path).subfolder(plan.fingerprint)
    files = []
    for number, start in enumerate(range(0, pairs, PART_ROWS)):
        rows = min(PART_ROWS, pairs - start)
        split = "eval" if number % 50 == 49 else "train"
        part = f"{split}/part-{number:05d}.parquet"
        columns: dict[str, Any] = {"row_id": np.arange(start, start + rows), "source": ["rows.jsonl"] * rows}
        columns["row_number"] = columns["row_id"] + 1
        for name in NAMES:
            lengths = rng.integers(tokens // 2, tokens * 3 // 2, rows)
            ids = rng.integers(0, len(tokenizer), int(lengths.sum()), dtype=np.int32)
            columns[f"{name}_ids"] = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), ids)
            columns[f"{name}_length"] = lengths.astype(np.int32)
            columns[name] = [" ".join(rng.choice(WORDS, tokens * 3 // 4)) for _ in range(rows)]
        files.append({"file": part, "rows": rows, **folder.write_table(part, pa.table(columns))})
    common_fields = {"fingerprint": plan.fingerprint, "format_version": plan.inputs["format_version"], "kind": plan.kind}
    manifest = {**common_fields, "sources": [], "lengths": {}, "notes": [], "files": files, "inputs": plan.inputs}
    folder.write_json(MANIFEST, {**manifest, CHECKSUM: checksum(manifest)})
    store = open_store(folder)
    assert store is not None
    return store


def write_scored(cfg: Any, prepared: Prepared) -> None:
    """Write random scores of the reference, with hidden states if the recipe keeps them."""
    plan, rng = make_score_plan(cfg, prepared, resolve_precision(cfg, use_gpu=False)), np.random.default_rng(0)
    folder = prepared_root(cfg.dataset_prepared_path).subfolder("reference").subfolder(plan.fingerprint)
    files = []
    for part, number in plan.parts.items():
        rows = prepared.read_part(part, ["row_id", *(f"{name}_ids" for name in NAMES)])
        lengths = [rows[f"{name}_ids"].combine_chunks().value_lengths().to_numpy() for name in NAMES[1:]]
        logps = [tuple(-rng.random(int(size), dtype=np.float32) for size in both) for both in zip(*lengths, strict=True)]
        write_scores(folder, part, rows, logps, 1)
        files.append({"file": part, "rows": number, **written(folder.read_bytes(part))})
    folder.write_json(MANIFEST, {"fingerprint": plan.fingerprint, "files": files, "inputs": plan.inputs})


class Peak:
    """The most memory, while it is open, of this process, and of it and Ray's workers together."""

    driver = total = 0

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._done.wait(SAMPLE_EVERY_S):
            own, others = me.memory_full_info().pss, 0
            for process in me.children(recursive=True):
                try:
                    is_worker = process.name().startswith("ray::") or "cluster.local_workers.fork_server" in process.cmdline()
                    others += process.memory_full_info().pss if is_worker else 0
                except psutil.NoSuchProcess:
                    continue
            self.driver, self.total = max(self.driver, own), max(self.total, own + others)


if __name__ == "__main__":
    main()
