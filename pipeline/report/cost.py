"""Cost and speed on a run's page: rows and tokens per second, use of the device, where the time went, traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, inside
from pipeline.report.page import Column, Fact, Row, Section, Table
from pipeline.report.timeline import RunTimeline
from pipeline.runs.folder import PROFILES, RunFolder

__all__ = ["cost_section", "worker_hours"]

PARTS = {
    "data": "waiting for the data loader",
    "generation": "generating and grading completions",
    "forward": "forward of the policy, and of a live reference",
    "backward": "backward",
    "exchange": "waiting for the gradients of other workers (DDP; otherwise within forward and backward)",
    "optimizer": "clipping and the optimizer's step",
    "other": "logging, reports, callbacks",
}
"""Part of a step -> what it is."""
RATES = {
    "pairs_per_second": "pairs/s",
    "rows_per_second": "rows/s",
    "completions_per_second": "completions/s",
    "tokens_per_second": "tokens/s of the sequences, without padding",
    "fed_tokens_per_second": "tokens/s fed, with padding, a packed prompt once",
    "mfu": "MFU: operations of the model, of the device's peak",
}
"""Metric -> label; medians are shown."""


def cost_section(folder: RunFolder, records: Sequence[dict[str, Any]], timeline: RunTimeline) -> Section:
    """Return the section; facts that a run of an earlier version didn't record are left out."""
    facts = [*_rates(records), *_hours(timeline, records), *_saving(records), *_traces(folder)]
    parts = _parts(records)
    whole = sum(parts.values())
    rows = [Row([f"{value:.4g}", f"{value / whole:.0%}", PARTS[name]]) for name, value in parts.items()]
    table = Table([Column("seconds a step"), Column("part"), Column("of rank 0", is_text=True)], rows) if rows else None
    return Section("cost", "Cost and speed", "" if facts or rows else "No step was logged.", facts=facts, table=table)


def worker_hours(timeline: RunTimeline, records: Sequence[dict[str, Any]]) -> float:
    """Return the hours that workers trained, summed over workers and attempts."""
    last = max([record["time"] for record in records if "time" in record], default=0.0)
    seconds, events = 0.0, timeline.events
    for event, following in pairwise([*events, None]):
        if event is not None and event["event"] == "training":
            end = following["time"] if following is not None else max(last, event["time"])
            seconds += (end - event["time"]) * sum(map(len, event["nodes"].values()))
    return seconds / 3600


def _rates(records: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    for name, label in RATES.items():
        if values := [record[name] for record in records if isinstance(record.get(name), int | float)]:
            median = float(np.median(values))
            yield Fact(label, f"{median:.1%}" if name == "mfu" else f"{median:,.4g}" if median < 100 else f"{median:,.0f}")
        elif name == "mfu" and any("fed_tokens_per_second" in record for record in records):
            yield Fact(label, "not counted for grpo, for rows with pictures, nor for models with experts")


def _hours(timeline: RunTimeline, records: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    if timeline.training is None:
        return
    unit = "worker hours" if timeline.training["setup"].get("device", "CPU") == "CPU" else "GPU hours"
    yield Fact(unit, f"{worker_hours(timeline, records):.3g}")


def _saving(records: Sequence[dict[str, Any]]) -> Iterator[Fact]:
    for name, label in (("save_seconds", "saving checkpoints"), ("eval_runtime", "evaluating")):
        if values := [record[name] for record in records if isinstance(record.get(name), int | float)]:
            yield Fact(label, f"{sum(values):.3g} s in all, beside the steps")


def _traces(folder: RunFolder) -> Iterator[Fact]:
    try:
        names = sorted(Folder(inside(folder.path, PROFILES)).names())
    except STORAGE_ERRORS:
        return
    if names:
        where = inside(folder.path, PROFILES)
        yield Fact("traces", f"{', '.join(names)} in {where}: open them at ui.perfetto.dev or chrome://tracing")


def _parts(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean seconds of a step by part; each record stands for the steps since the one before."""
    timed = [record for record in records if isinstance(record.get("seconds/step"), int | float)]
    steps = np.diff([0, *(record["step"] for record in timed)])
    sums = {name: sum(n * record.get(f"seconds/{name}", 0.0) for n, record in zip(steps, timed, strict=True)) for name in PARTS}
    return {name: float(value / steps.sum()) for name, value in sums.items() if value}
