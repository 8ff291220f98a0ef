"""Tables that commands end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config.secrets import redact_text
from pipeline.storage import inside

if TYPE_CHECKING:
    from pipeline.config.packaged import PackagedRecipe
    from pipeline.data import Prepared
    from pipeline.doctor.examination import Examination
    from pipeline.doctor.memory import Diagnosis
    from pipeline.merging.merge import MergeResult
    from pipeline.reference import Scores
    from pipeline.training.driver import TrainResult
    from pipeline.tuning.result import SweepResult

__all__ = ["print_examination", "print_merged", "print_recipes", "print_result", "print_scores", "print_sweep"]

METRICS = (
    "loss",
    "reward",
    "kl",
    "rewards/accuracies",
    "rewards/margins",
    "eval_loss",
    "eval_reward",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
)


def print_result(result: TrainResult, console: Console | None = None) -> None:
    """Print the last metrics of a run and where its files are."""
    console = console or Console()
    table = Table(title=f"{result.steps} steps")
    table.add_column("metric")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    history = result.history
    for name in METRICS:
        if name in history:
            values = history[name].dropna()
            first, last = (f"{values.iloc[place]:.4f}" if len(values) else "nan" for place in (0, -1))
            table.add_row(name, first, last)
    console.print(table)
    for label, path in (
        ("model", result.model_dir),
        ("metrics", inside(result.run_dir, "metrics.jsonl")),
        ("config", inside(result.run_dir, "config.yaml")),
        *([("report", result.report)] if result.report is not None else []),
    ):
        console.print(f"{label:<8}{path}", soft_wrap=True, highlight=False)


def print_sweep(result: SweepResult, console: Console | None = None) -> None:
    """Print the trials of a sweep, and where its files are."""
    from pipeline.tuning.table import live_table

    console = console or Console()
    assert result.cfg.tune is not None
    if not console.is_terminal:
        console = Console(width=max(console.width, 140), file=console.file)
    console.print(live_table(result.records, list(result.cfg.tune.space), result.measure))
    for label, path in (
        *([("best", inside(result.run_dir, "best.yaml"))] if result.best is not None else []),
        ("trials", inside(result.run_dir, "trials.csv")),
        ("report", result.report),
    ):
        console.print(f"{label:<8}{path}", soft_wrap=True, highlight=False)


def print_recipes(recipes: list[PackagedRecipe], console: Console | None = None) -> None:
    """Print of each packaged recipe what it trains, what its settings were published for, and where."""
    console = console or Console()
    width = max(len(recipe.name) for recipe in recipes) + 2
    for recipe in recipes:
        published = f"; published for {recipe.hardware}" if recipe.hardware else ""
        lines = [f"{recipe.method}: {recipe.model}{published}", *recipe.sources]
        for name, line in zip([recipe.name, *[""] * len(recipe.sources)], lines, strict=True):
            console.print(f"{name:<{width}}{line}", soft_wrap=True, highlight=False, markup=False)


def print_scores(
    scores: Scores, prepared: Prepared | None = None, seconds: float | None = None, console: Console | None = None
) -> None:
    """Print what the score stage did, and where the scores are.

    Args:
        scores: what it returned.
        prepared: the rows, to count their tokens.
        seconds: that it took, the loading of the reference among them.
        console: standard output by default.
    """
    console = console or Console()
    table = Table(title="reference log-probabilities")
    table.add_column("")
    table.add_column("train", justify="right")
    table.add_column("eval", justify="right")
    table.add_row("rows", str(scores.train_rows), str(scores.eval_rows))
    if prepared is not None:
        table.add_row("scored tokens", *(str(_completion_tokens(prepared, split)) for split in ("train", "eval")))
    console.print(table)
    done = "none, the scores were there already"
    if scores.scored_rows:
        done = f"{scores.forwards} over {scores.scored_rows} rows"
    if scores.scored_rows and seconds is not None:
        done += f" in {seconds:.1f} s: {scores.scored_rows / seconds:.1f} rows/s"
    console.print(f"forwards  {done}", soft_wrap=True, highlight=False)
    if scores.padded_because:
        console.print(f"unpacked  one completion at a time: {scores.padded_because}", soft_wrap=True, highlight=False)
    console.print(f"scores    {scores.path}", soft_wrap=True, highlight=False)


def print_merged(result: MergeResult, console: Console | None = None) -> None:
    """Print what a merged model is, and how far it is from base and adapter."""
    console = console or Console()
    size = f"{result.nbytes / 10**9:.2f} GB" if result.nbytes >= 10**9 else f"{result.nbytes / 10**6:.1f} MB"
    console.print(
        f"tensors  {result.merged} of {result.tensors} changed, {size}, {result.dtype}", highlight=False, soft_wrap=True
    )
    if (found := result.differences) is not None:
        table = Table(title=f"merged, and base + adapter, on {found.tokens} tokens")
        for name in ("", "largest", "rms"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row("logits", f"{found.logits:.2g}", "")
        for name, gap in (
            ("log-probabilities", found.logps),
            ("  what rounding explains", found.rounding),
            ("  what the adapter does", found.adapter),
        ):
            table.add_row(name, f"{gap.largest:.2g}", f"{gap.rms:.2g}")
        table.add_row("same most probable token", f"{found.same_argmax:.1%}", "")
        console.print(table)
    console.print(f"model    {result.path}", soft_wrap=True, highlight=False)


MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "reference": "reference model",
    "activations": "activations",
    "token_head": "token head",
    "buckets": "DDP's buckets",
    "process": "process",
}
"""Items of `strategies.memory.MemoryEstimate`, in words."""


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_examination(found: Examination, console: Console | None = None) -> None:
    """Print what was checked, and the predicted memory of one worker item by item."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 200), file=console.file)
    table = Table(title="checks")
    table.add_column("")
    table.add_column("check", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for check in found.checks:
        table.add_row(Text(check.status, style=STYLES[check.status]), check.name, Text(redact_text(check.finding)))
    console.print(table)
    if found.diagnosis is not None:
        _print_memory(found.diagnosis, console)


def _print_memory(found: Diagnosis, console: Console) -> None:
    table = Table(title="peak memory of one worker")
    table.add_column("")
    table.add_column("MiB", justify="right")
    for name, size in found.estimate.items().items():
        if size:
            table.add_row(MEMORY[name], _mib(size))
    table.add_section()
    table.add_row("total", _mib(found.estimate.total))
    if (measured := found.measured) is not None:
        off = found.estimate.total / measured.training - 1
        table.add_row("measured in training", _mib(measured.training))
        table.add_row("prediction is off by", f"{100 * off:+.0f} %")
        if measured.loading:
            table.add_row("measured in loading", _mib(measured.loading))
    console.print(table)
    machine = found.room.machine
    line = f"{found.room.name} has {_mib(machine.total)} MiB, {_mib(machine.free)} of them free now"
    console.print(line, soft_wrap=True, highlight=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _completion_tokens(prepared: Prepared, split: str) -> int:
    """Tokens of the completions, each of which has a score."""
    import pyarrow.compute as pc

    lengths = prepared.read(split, ["chosen_length", "rejected_length"])
    return sum(pc.sum(lengths[name]).as_py() or 0 for name in lengths.column_names)
