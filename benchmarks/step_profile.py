"""Where the time of one step of ours goes, and its token head beside TRL's."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from benchmarks import common
from strategies.packing.head import token_outputs

__all__ = ["head_table", "name_of", "profile_table"]

WANTED = ("entropy", "mean_logits", "is_top1")
"""What both heads compute beside log-probabilities: the statistics of the logged metrics."""
REPEATS = 3


def name_of(dtype: torch.dtype) -> str:
    """As a person says it."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16 autocast"}[dtype]


def profile_table(trainer: Any, title: str) -> Table:
    """Where the time of one step goes, by groups of operators and by the largest of them."""
    share = next(iter(trainer.get_train_dataloader()))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as passes:
        trainer.training_step(trainer.model, share)
    with profile(activities=[ProfilerActivity.CPU]) as update:
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
    vocabulary = trainer.model.get_output_embeddings().weight.shape[0]
    events = [
        (group_of(event.key, event.input_shapes, vocabulary), event) for event in passes.key_averages(group_by_input_shape=True)
    ]
    events += [("optimizer and clipping", event) for event in update.key_averages()]
    groups: dict[str, float] = defaultdict(float)
    operators: dict[tuple[str, str], float] = defaultdict(float)
    for group, event in events:
        groups[group] += event.self_cpu_time_total
        operators[group, event.key] += event.self_cpu_time_total
    total = sum(groups.values())
    table = Table("group", "s", "part", "of which", title=f"one step, {title}")
    for group, spent in sorted(groups.items(), key=lambda item: -item[1]):
        largest = sorted(((time, name) for (own, name), time in operators.items() if own == group), reverse=True)[:5]
        detail = ", ".join(
            f"{name.removeprefix('aten::')} {time / total:.1%}" for time, name in largest if time > 0.005 * total
        )
        table.add_row(group, f"{spent / 1e6:.2f}", f"{spent / total:.1%}", detail)
    return table


def group_of(operator: str, shapes: Sequence[Any], vocabulary: int) -> str:
    """The part of a step that an operator belongs to, by its name, and by whether its inputs are as wide as the vocabulary."""
    sizes = [shape for shape in shapes if isinstance(shape, (list, tuple))]
    if "scaled_dot_product" in operator:
        return "attention"
    of_head = any(vocabulary in shape for shape in sizes)
    if operator in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise"):
        return "head: products" if of_head else "linear layers: products"
    return "head: elementwise" if of_head else "norms, elementwise, copies"


def head_table(trainer: Any, dtype: torch.dtype) -> Table:
    """Both heads on the scored tokens of a step's first forward, forward and backward, in turn."""
    row = next(iter(trainer.get_train_dataloader())).batches[0].row
    weight = trainer.model.get_output_embeddings().weight.detach().clone()
    states = torch.randn(len(row.labels), weight.shape[1]) / weight.shape[1] ** 0.5
    title = f"head on {len(row.labels):,} scored tokens of {row.input_ids.numel():,}, {name_of(dtype)}"
    table = Table("head's weight", "TRL's CPU s", "ours", "ratio", title=title)
    for trained in (True, False):
        seconds: dict[str, list[float]] = {name: [] for name in HEADS}
        for name in [*HEADS] * REPEATS:
            seconds[name].append(common.timed(partial(run_head, HEADS[name], states, weight, row.labels, trained, dtype)).cpu)
        ratios = [their / our for their, our in zip(seconds["trl"], seconds["ours"], strict=True)]
        medians = (f"{statistics.median(values):.2f}" for values in seconds.values())
        table.add_row("trained" if trained else "frozen", *medians, common.ratio_text(ratios))
    table.caption = "On a CPU TRL's runs on every position besides, prompts and padding among them."
    return table


def _their_head(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", *WANTED))
    return ChunkedLogProbFunction.apply(states, weight, None, labels, *options)[0]


def _our_head(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_outputs(states, weight, None, labels, WANTED).log_probs


HEADS = {"trl": _their_head, "ours": _our_head}


def run_head(head: Any, states: Tensor, weight: Tensor, labels: Tensor, trained: bool, dtype: torch.dtype) -> None:
    """Forward and backward."""
    states, weight = states.clone().requires_grad_(), weight.detach().requires_grad_(trained)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        head(states, weight, labels).sum().backward()
