"""Page of a run: findings, metrics, answers, timeline, workers, data, config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.config import RunConfig, parse_saved
from pipeline.errors import ConfigError, UserError
from pipeline.findings.run import find_in_records
from pipeline.io.storage import inside
from pipeline.report.answers import answer_sections
from pipeline.report.cost import cost_section
from pipeline.report.curves import curve_sections
from pipeline.report.findings import findings_section
from pipeline.report.page import Fact, Page, Section, render
from pipeline.report.rows import Rows
from pipeline.report.timeline import RunTimeline, format_duration, format_nodes, format_time, requested_workers
from pipeline.runs.folder import CONFIG, RUN, RunFolder
from pipeline.runs.fork import origin_of
from pipeline.runs.metrics import MetricsFile
from pipeline.ui.display import SHOWN
from strategies.methods.registry import get_strategy

__all__ = ["run_page"]

ON_TOP = ("loss", "rewards/accuracies", "rewards/margins", "reward")
"""Metrics at the top of a page: those of the evaluation if there is one, else of training."""


@dataclass(frozen=True)
class _Run:
    """Contents of a run's folder."""

    folder: RunFolder
    state: dict[str, Any]
    text: str
    """`config.yaml`."""
    cfg: RunConfig
    records: list[dict[str, Any]]
    timeline: RunTimeline

    @property
    def step(self) -> int:
        """Last recorded step."""
        return max((record["step"] for record in self.records), default=0)


def run_page(folder: RunFolder) -> str:
    """Render the page of the run in a folder, finished or not.

    Raises:
        UserError: when the folder holds no run, or one whose `run.json`, `config.yaml` or `metrics.jsonl` is broken.
        OSError, pyarrow.ArrowException, NotImplementedError: when storage fails.
    """
    run = _read(folder)
    rows = Rows.of(run.cfg, run.state.get("prepared"), run.state.get("scores"))
    findings = find_in_records(folder, run.cfg, run.state, run.records)
    sections = [
        findings_section(findings, run.state["status"] == "finished"),
        *curve_sections(list(_with_logratios(run)), run.timeline.marks),
        *answer_sections(folder, run.step),
        cost_section(folder, run.records, run.timeline),
        run.timeline.section(),
        Section("resources", "Workers and batches", facts=list(_resources(run, rows))),
        *rows.sections,
        Section("config", f"{CONFIG} ({len(run.text.splitlines())} lines)", text=run.text, is_folded=True),
    ]
    return render(Page(f"Run in {folder.path}", _subtitle(run), list(_facts(run)), sections))


def _read(folder: RunFolder) -> _Run:
    state = folder.state()
    if state is None:
        raise UserError(f"{folder.path} holds no run: {RUN} is missing; give the output_dir of one")
    text = folder.storage.read(CONFIG)
    if text is None:
        raise UserError(f"{folder.path} holds a part of a run: {CONFIG} is missing; put it back")
    cfg = parse_saved(text, str(folder.config))
    try:
        # `parse_saved` doesn't check `rl`, which may be of a plugin that isn't loaded here.
        get_strategy(cfg.rl)
    except ValueError as error:
        raise ConfigError(str(folder.config), [("rl", str(error).removeprefix("rl: "))]) from error
    records = MetricsFile(folder.metrics).read()
    try:
        return _Run(folder, state, text, cfg, records, RunTimeline(state, records))
    except ValueError as error:
        raise UserError(f"{inside(folder.path, RUN)} is broken: {error}; give the output_dir of another run") from error


def _with_logratios(run: _Run) -> Iterator[dict[str, Any]]:
    """Yield the records, adding log(policy / reference) if rewards are beta times that."""
    strategy = get_strategy(run.cfg.rl)
    if strategy.batch_kind == "prompt" or not strategy.uses_reference(run.cfg):
        yield from run.records
        return
    # Runs record rewards alone; dividing by beta gives the log-ratio back.
    beta = strategy.reward_scale(run.cfg)
    for record in run.records:
        rewards = {name: value for name, value in record.items() if name.endswith(("rewards/chosen", "rewards/rejected"))}
        ratios = {name.replace("rewards/", "logratios/"): value / beta for name, value in rewards.items() if value is not None}
        yield {**record, **ratios}


def _subtitle(run: _Run) -> str:
    what = f"{run.cfg.rl} of {run.cfg.base_model}" + (f" with {run.cfg.adapter}" if run.cfg.adapter else "")
    since = f", started {format_time(run.timeline.events[0]['time'])} UTC" if run.timeline.events else ""
    origin = origin_of(run.folder)
    source = f", from the checkpoint of step {origin['step']} of {origin['path']}" if origin is not None else ""
    return f"{what}{source}{since}."


def _facts(run: _Run) -> Iterator[Fact]:
    total = run.state.get("total_steps")
    yield Fact("status", run.timeline.status)
    yield Fact("steps", f"{run.step:,}" + (f" of {total:,}" if total else ""))
    for name in ON_TOP:
        evaluated = _values(run.records, f"eval_{name}")
        values, shown = (evaluated, f"eval_{name}") if evaluated else (_values(run.records, name), name)
        if values:
            first = f" (first {_number(values[0])})" if len(values) > 1 else ""
            yield Fact(f"{SHOWN.get(shown, shown)}{first}", _number(values[-1]))
    if tokens := _values(run.records, "num_tokens"):
        yield Fact("tokens", f"{int(tokens[-1]):,}")
    if speeds := _values(run.records, "tokens_per_second"):
        yield Fact("tokens/s (median)", f"{np.median(speeds):,.0f}")
    if run.timeline.seconds is not None:
        yield Fact("wall time", format_duration(run.timeline.seconds))
    if speeds := _values(run.records, "mfu"):
        yield Fact("MFU (median)", f"{np.median(speeds):.1%}")
    if run.timeline.restarts:
        yield Fact("restarts after failures", str(run.timeline.restarts))


def _values(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if isinstance(record.get(name), int | float)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _resources(run: _Run, rows: Rows) -> Iterator[Fact]:
    cfg, began, training = run.cfg, run.timeline.began, run.timeline.training
    setup: dict[str, Any] = training["setup"] if training is not None else {}
    yield Fact("workers", requested_workers(began["workers"]) if began is not None else f"{cfg.num_workers}")
    if training is not None:
        yield Fact("nodes", format_nodes(training["nodes"]))
    if setup:
        yield Fact("device", setup["device"])
        yield Fact("precision", f"weights in {setup['weights']}, products in {setup['products']}")
    if began is not None:
        yield Fact("sharding", began["sharding"] or "none: every worker holds the whole model")
    accumulation = f" x {cfg.gradient_accumulation_steps} (accumulation)" if cfg.gradient_accumulation_steps > 1 else ""
    size = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.num_workers
    yield Fact("global batch", f"{size:,} = {cfg.micro_batch_size} (micro batch){accumulation} x {cfg.num_workers} (workers)")
    if setup:
        packed = f"packed rows{f', {rows.tokens_saved}' if rows.tokens_saved else ''}"
        yield Fact("batches", packed if setup["packed"] else "padded")
    if run.state.get("scores") is not None:
        yield Fact("reference", f"log-probabilities computed once ({run.state['scores']})")
