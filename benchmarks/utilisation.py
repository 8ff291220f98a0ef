"""`python -m benchmarks.utilisation`: how near a training step of ours comes to plain matrix products of its own shapes.

Counted as useful: the linear layers on every token of the packed rows, attention on what its mask allows, and the head on the
scored tokens; forward once, backward twice that. Not counted, though computed: the head's second projection in the backward
pass, attention's recomputation, and everything that is no matrix product. The limit is what the useful products alone would
take, one after the other: each distinct shape is timed as a plain product, forward and both of the backward pass, after every
step; by the clock and, since a machine that is busy with more is not busy alike all the time, by processor time. `--bf16`
adds the same under autocast, with products of bfloat16.

Then a profile of one step, and the token head of `strategies/packing/head.py` beside TRL's on the same tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks import common
from benchmarks.sides import our_trainer, scored
from benchmarks.step_profile import head_table, name_of, profile_table
from benchmarks.training import Turns, Watch
from strategies.packing.head import ELEMENTS

REPEATS = 3


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = common.parser("utilisation", __doc__)
    parser.add_argument("--tokens-per-forward", type=int, help="of the trainer")
    options = parser.parse_args(arguments)
    common.quiet(options.threads)
    model, tokenizer = common.load(options)
    rows = common.load_rows(options, tokenizer, options.steps * options.batch)
    rows = scored(copy.deepcopy(model), tokenizer, rows, options)
    precisions = [torch.float32, torch.bfloat16] if options.bf16 else [torch.float32]
    turns = Turns(len(precisions))
    with tempfile.TemporaryDirectory() as folder:
        trainers, watches = [], []
        for index, dtype in enumerate(precisions):
            options.bf16 = dtype == torch.bfloat16
            watch = ProductWatch(turns, index, dtype)
            keys = {"tokens_per_forward": options.tokens_per_forward}
            trainers.append(our_trainer(copy.deepcopy(model), tokenizer, rows, options, folder, [watch], **keys))
            watch.follow(trainers[-1])
            watches.append(watch)
        turns.run([trainer.train for trainer in trainers])
    console = common.console()
    console.print(table_of_steps(watches, options))
    for trainer, dtype in zip(trainers, precisions, strict=True):
        console.print(profile_table(trainer, name_of(dtype)))
        console.print(head_table(trainer, dtype))


class ProductWatch(Watch):
    """Times the plain products of a step's shapes when the step is done."""

    def __init__(self, turns: Turns, index: int, dtype: torch.dtype) -> None:
        super().__init__(turns, index)
        self.dtype = dtype
        self.useful: list[float] = []
        self.limit: list[common.Times] = []
        self._packed: list[tuple[tuple[Any, ...], int]] = []

    def follow(self, trainer: Any) -> None:
        """Note the shapes of its forwards from now on."""
        super().follow(trainer)
        self.model = trainer.model

        def note(module: Any, args: Any, kwargs: Any) -> None:
            self._packed.append((kwargs["packed"].segments, len(kwargs["labels"])))

        trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    def after_step(self) -> None:
        """Time the products of the step."""
        products = [product for segments, number in self._packed for product in useful_products(self.model, segments, number)]
        self._packed.clear()
        rates = {shape: plain_rate(shape, self.dtype) for shape in {shape for shape, _ in products}}
        self.useful.append(sum(operations for _, operations in products))
        self.limit.append(
            common.Times(*(sum(operations / rates[shape][clock] for shape, operations in products) for clock in (0, 1)))
        )


Shape = tuple[int, int, int, int]
"""(batch, m, k, n): a product of (batch, m, k) and (batch, k, n)."""


def useful_products(model: Any, segments: Sequence[Any], number: int) -> Iterator[tuple[Shape, float]]:
    """The products of a packed row as (shape, useful operations), forward and backward.

    Args:
        number: of scored tokens.
    """
    tokens = sum(segment.tokens for segment in segments)
    linear = Counter(tuple(module.weight.shape) for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    for (outputs, inputs), times in linear.items():
        for shape in forward_and_backward(tokens, inputs, outputs):
            yield shape, times * 2.0 * math.prod(shape)
    vocabulary, hidden = model.get_output_embeddings().weight.shape
    piece = min(number, max(1, ELEMENTS // vocabulary))
    for shape in forward_and_backward(piece, hidden, vocabulary):
        yield shape, number / piece * 2.0 * math.prod(shape)
    config = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = round(statistics.mean(segment.shared + segment.chosen for segment in segments))
    # Queries with keys, and weights with values; all square in the sequence, and as fast as one another.
    operations = 3 * layers * heads * 4.0 * size * sum(segment.keys for segment in segments)
    yield (heads, length, size, length), operations / 2
    yield (heads, length, length, size), operations / 2


def forward_and_backward(tokens: int, inputs: int, outputs: int) -> tuple[Shape, Shape, Shape]:
    """The products of a linear layer: its output, and the gradients of its input and of its weight."""
    return (1, tokens, inputs, outputs), (1, tokens, outputs, inputs), (1, outputs, tokens, inputs)


def plain_rate(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second, and per second of processor time, of a plain product."""
    batch, m, k, n = shape
    # The right side is transposed, as a weight is in a linear layer.
    left, right = torch.randn(batch, m, k).to(dtype), torch.randn(batch, n, k).to(dtype).transpose(1, 2)
    left, right = (left, right) if batch > 1 else (left[0], right[0])
    times = [common.timed(lambda: left @ right) for _ in range(REPEATS)]
    wall, cpu = (2.0 * math.prod(shape) / statistics.median(each) for each in zip(*times, strict=True))
    return wall, cpu


def spread(parts: Sequence[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(parts):.0%} ({min(parts):.0%}..{max(parts):.0%})"


def table_of_steps(watches: list[ProductWatch], options: argparse.Namespace) -> Table:
    """One row per step and precision."""
    table = Table(title=f"steps of {options.batch} pairs of {options.model}")
    for name in "precision|step|tokens|s|useful TFLOP|GFLOP/s|plain products|reached|CPU s|plain products|reached".split("|"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    notes = []
    for watch in watches:
        for step, times in enumerate(watch.times):
            useful, limit = watch.useful[step], watch.limit[step]
            table.add_row(
                name_of(watch.dtype),
                str(step + 1),
                f"{watch.policy_tokens[step]:,}",
                f"{times.wall:.2f}",
                f"{useful / 1e12:.3f}",
                f"{useful / times.wall / 1e9:.0f}",
                f"{useful / limit.wall / 1e9:.0f}",
                f"{limit.wall / times.wall:.0%}",
                f"{times.cpu:.2f}",
                f"{limit.cpu:.2f}",
                f"{limit.cpu / times.cpu:.0%}",
            )
        pairs = list(zip(watch.limit, watch.times, strict=True))
        reached = [spread([limit[clock] / times[clock] for limit, times in pairs]) for clock in (0, 1)]
        notes.append(f"{name_of(watch.dtype)} reaches {reached[0]} of the time, {reached[1]} of the processor time")
    if len(watches) > 1:
        steps = list(zip(*(watch.times for watch in watches), strict=True))
        wall, cpu = (common.ratio_text([plain[clock] / half[clock] for plain, half in steps]) for clock in (0, 1))
        notes.append(f"bf16 is {wall} as fast as fp32, by processor time {cpu}")
    table.caption = "\n".join([*notes, common.machine(options.threads)])
    return table


if __name__ == "__main__":
    main()
