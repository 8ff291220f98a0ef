"""`python -m benchmarks.scale --pairs 1000000`: memory and time of every stage, beside those of `--beside` pairs.

Makes pairs of about 700 tokens, log-normal in length, prepares them with Ray Data, scores them, and trains a tiny model on them
for `--steps` steps with two workers. The scores are not computed by the model, but by a stand-in, which knows that the model
gives every token the same probability; the score stage joins them to a store as it does with those of its actors. All else is
what any run does.

Memory is sampled, and printed as the peak of one process of each kind: private memory, and what it shares as mapped files and
in Ray's object store, of which pages that several processes map count in equal parts for each (PSS). Writing the pairs and the
stand-in's scores is not measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from benchmarks import common, synthetic
from benchmarks.memory import Memory, MemoryWatch
from pipeline import prepare, score, train
from pipeline.config import RunConfig, parse_config
from pipeline.data import Prepared
from pipeline.data.staged_parts import STAGING
from pipeline.data.store import prepared_root
from pipeline.ray.session import init_ray
from pipeline.reference.plan import make_plan
from pipeline.reference.precision import resolve_precision
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile

SEQUENCE_LEN = 4096
WORKERS = 2
TASKS = 8
"""That stage the scores."""


@dataclass(frozen=True)
class Measured:
    """Of one number of pairs."""

    pairs: int
    seconds: dict[str, float]
    """Of each stage."""
    memory: dict[str, dict[str, Memory]]
    """Stage -> group of processes -> peak of one of them."""
    until_first_step: float
    """Seconds, from the start of the workers to the end of the first step."""


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--beside", type=int, default=10_000, help="pairs of the run to compare with; 0 for none")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", help="for data and results, which are deleted at the end; by default a temporary one")
    options = parser.parse_args(arguments)
    common.quiet(os.cpu_count() or 1)
    console = common.console()
    found = []
    for pairs in filter(None, (options.beside, options.pairs)):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as folder:
            found.append(measure(Path(folder), pairs, options.steps, console))
    show(found, console)


def measure(folder: Path, pairs: int, steps: int, console: Console) -> Measured:
    """Make pairs and run every stage on them."""
    synthetic.save_model(folder / "model", SEQUENCE_LEN)
    cfg = config_of(folder, steps)
    seconds: dict[str, float] = {}
    memory: dict[str, dict[str, Memory]] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        watch = MemoryWatch()
        began = time.perf_counter()
        with watch.watching():
            result = work()
        seconds[name], memory[name] = time.perf_counter() - began, watch.peaks
        console.print(f"{pairs:,} pairs: {name} {seconds[name]:.1f} s")
        return result

    init_ray(cfg)
    write_pairs(folder / "pairs", pairs)
    prepared = stage("prepare", lambda: prepare(cfg))
    stage_scores(cfg, prepared)
    stage("score (stand-in)", lambda: score(cfg, prepared))
    stage("train", lambda: train(cfg))
    return Measured(pairs, seconds, memory, until_first_step(cfg))


def config_of(folder: Path, steps: int) -> RunConfig:
    """The recipe of all stages."""
    return parse_config(
        {
            "base_model": str(folder / "model"),
            "rl": "dpo",
            "reference": "cached",
            "datasets": [{"path": str(folder / "pairs")}],
            "dataset_prepared_path": str(folder / "prepared"),
            "sequence_len": SEQUENCE_LEN,
            "excess_length_strategy": "truncate",
            "micro_batch_size": 4,
            "max_steps": steps,
            "logging_steps": 1,
            "save_strategy": "no",
            "output_dir": str(folder / "run"),
            "ray": {"num_workers": WORKERS, "cache_dir": str(folder / "cache")},
        }
    )


# A worker of Ray's runs one of these and ends, so that it brings no memory of theirs into a stage.
_write_pairs = ray.remote(max_calls=1)(synthetic.write_pairs)
_stage_scores = ray.remote(max_calls=1)(synthetic.stage_scores)


def write_pairs(folder: Path, pairs: int) -> None:
    """Write the raw pairs, a file per task."""
    files = range(-(-pairs // synthetic.PAIRS_PER_FILE))
    sizes = [min(synthetic.PAIRS_PER_FILE, pairs - number * synthetic.PAIRS_PER_FILE) for number in files]
    ray.get([_write_pairs.remote(folder, number, size) for number, size in zip(files, sizes, strict=True)])


def stage_scores(cfg: RunConfig, prepared: Prepared) -> None:
    """Stage the stand-in's scores where the score stage looks for those of its actors."""
    plan = make_plan(cfg, prepared, resolve_precision(cfg, False))
    staging = prepared_root(cfg.dataset_prepared_path).subfolder(f"reference/{plan.fingerprint}/{STAGING}")
    parts = list(plan.parts.items())
    ray.get([_stage_scores.remote(prepared, staging.carried(), dict(parts[start::TASKS])) for start in range(TASKS)])


def until_first_step(cfg: RunConfig) -> float:
    """Seconds from the start of the workers to the end of their first step, by the run's own records."""
    folder = RunFolder(cfg.output_dir)
    began = next(event["time"] for event in folder.known()["events"] if event["event"] == "began")
    return MetricsFile(folder.metrics).read()[0]["time"] - began


def show(found: list[Measured], console: Console) -> None:
    """Print the tables."""
    times = Table("stage", *(f"{one.pairs:,} pairs" for one in found), title="seconds, and pairs a second")
    for name in found[-1].seconds:
        times.add_row(name, *(_rate(one, name) for one in found))
    times.add_row("workers' start to first step", *(f"{one.until_first_step:.1f} s" for one in found))
    times.caption = "the scores are from a stand-in for the model: this stage joins, checks and hashes them"
    console.print(times)
    columns = [f"{kind}, {one.pairs:,}" for one in found for kind in ("private", "shared")]
    sizes = Table("stage", "processes", *columns, title="most memory of one process, MiB")
    if len(found) > 1:
        sizes.add_column("private, more")
    for name, groups in found[-1].memory.items():
        for group in groups:
            peaks = [one.memory[name].get(group, Memory()) for one in found]
            cells = [_mib(size) for peak in peaks for size in (peak.private, peak.shared)]
            more = [_mib(peaks[-1].private - peaks[0].private)] * (len(found) > 1)
            sizes.add_row(name, group, *cells, *more)
    console.print(sizes)
    console.print(common.machine(os.cpu_count() or 1))


def _rate(one: Measured, stage: str) -> str:
    rate = "" if stage == "train" else f", {one.pairs / one.seconds[stage]:,.0f} pairs/s"
    return f"{one.seconds[stage]:.1f} s{rate}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    main()
