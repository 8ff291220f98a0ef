"""`python -m benchmarks.trial_start`: what one more trial of a sweep costs, from its free slot to its first step.

A sweep of LoRA trials on one shared base, by `pipeline.tune`, with more trials than slots: the first of them start with the
host, the others one after another in slots that become free. Every trial notes the points that it passes. Wall seconds are
medians of the trials, and depend on what else the machine does; CPU seconds are those of the process that does the work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from rich.table import Table

from benchmarks import common
from benchmarks.trial_marks import Mark, marking, read_marks
from pipeline import tune
from pipeline.config import RunConfig, parse_config
from pipeline.ui.display import SilentDisplay
from tests.tiny import pairs, save_tiny

PHASES = {
    "free": "the trial before has left its slot; Tune hears of it, and chooses the next one",
    "actor": "the trial's actor begins",
    "run": "recipe checked, Ray found, folder opened",
    "folder": "data and scores found, worker's arguments made",
    "wanted": "a slot asked for, given, its first turn",
    "turn": "scratch folder, tokenizer",
    "tokenizer": "rows, adapter, trainer",
    "trainer": "first step begins",
}
"""Point -> what happens from there to the next one."""
POINTS = (*PHASES, "first step")


class Phase(NamedTuple):
    """Seconds from a point to the next one, of one trial."""

    wall: float
    cpu: float | None
    """None where two processes take part."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trial_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="base_model; a tiny one of random weights when not set")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--rows", type=int, default=40, help="pairs")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of Ray")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="trial-start-") as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run the sweep and print the table."""
    cfg, began = recipe(options, folder), {}

    class Stages(SilentDisplay):
        def stage(self, name: str, total: int | None = None) -> None:
            began.setdefault(name, time.time())

    with marking():
        result = tune(cfg, display=Stages())
    ray.shutdown()
    if wrong := [record for record in result.records if record.status != "finished"]:
        raise SystemExit(f"trials have not finished: {wrong}")
    marks = read_marks(folder / "sweep")
    pids = {name: points["actor"].pid for name, points in marks.items()}
    first, later = [], []
    for name, points in sorted(marks.items(), key=lambda item: item[1]["actor"].time):
        # Tune gives an actor one trial after the other.
        before = [marks[other] for other in marks if pids[other] == pids[name] and is_before(marks[other], points)]
        last = max((one["left"] for one in before), key=lambda one: one.time, default=None)
        begun = last or Mark(name, "free", 0, began["running trials"], 0.0)
        (later if last else first).append(phases({**points, "free": begun._replace(pid=0)}))
    kinds = f"{len(first)} trials with the host, {len(later)} after others"
    title = f"from a free slot to the first step: {kinds}, {options.slots} slots; {common.machine(options.cpus)}"
    table = Table("phase", "with the host s", "CPU", "after another s", "CPU", title=title)
    for point, text in PHASES.items():
        table.add_row(text, *cells([trial[point] for trial in first]), *cells([trial[point] for trial in later]))
    sums = [[trial_sum(trial) for trial in kind] for kind in (first, later)]
    table.add_section()
    table.add_row("in all", *cells(sums[0]), *cells(sums[1]))
    common.console().print(table)
    print("after another, each:", ", ".join(f"{one.wall:.2f}" for one in sums[1]))
    print(f"the sweep: {time.time() - min(began.values()):.1f} s")


def is_before(earlier: dict[str, Mark], later: dict[str, Mark]) -> bool:
    """Whether a trial has begun before another one."""
    return earlier["actor"].time < later["actor"].time


def phases(points: dict[str, Mark]) -> dict[str, Phase]:
    """What follows each point."""
    return {here: phase(points[here], points[after]) for here, after in itertools.pairwise(POINTS)}


def phase(here: Mark, after: Mark) -> Phase:
    """What lies between two points."""
    return Phase(after.time - here.time, after.cpu - here.cpu if after.pid == here.pid else None)


def trial_sum(found: dict[str, Phase]) -> Phase:
    """Of a trial's phases."""
    return Phase(sum(one.wall for one in found.values()), sum(one.cpu or 0.0 for one in found.values()))


def cells(found: Iterable[Phase]) -> tuple[str, str]:
    """Medians over trials."""
    walls, cpus = zip(*found, strict=True)
    known = [cpu for cpu in cpus if cpu is not None]
    return f"{statistics.median(walls):.2f}", f"{statistics.median(known):.2f}" if known else ""


def recipe(options: argparse.Namespace, folder: Path) -> RunConfig:
    """The sweep's, in the folder `sweep`."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(options.rows)))
    space: dict[str, Any] = {"learning_rate": {"grid": [1e-5 * (number + 1) for number in range(options.trials)]}}
    section = {"space": space, "search": "grid", "baseline": False, "slots": options.slots, "share_base": True}
    # One host, with all CPUs.
    return parse_config(
        {
            "base_model": options.model or save_tiny(folder / "tiny"),
            "datasets": [{"path": str(folder / "pairs.jsonl")}],
            "val_set_size": 8,
            "dataset_prepared_path": str(folder / "prepared"),
            "sequence_len": 256,
            "micro_batch_size": 4,
            "num_epochs": 4,
            "save_strategy": "no",
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "plugins": ["benchmarks.trial_marks"],
            "output_dir": str(folder / "sweep"),
            "ray": {"resources_per_worker": {"CPU": options.cpus}},
            "tune": {**section, "max_concurrent_trials": options.slots},
        }
    )


if __name__ == "__main__":
    main()
