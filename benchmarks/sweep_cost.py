"""`python -m benchmarks.sweep_cost`: what N trials on the same pairs compute, with scores computed once, without, and by TRL.

Trials that differ in learning rate run for real, on a model of one narrow layer, and hooks count the tokens that go through
it: those that train (forward and backward), those that only score (no gradient), those recomputed for a backward pass, and
those that the head projects. The numbers of operations are those of `--model` on so many tokens: 2 per weight and token
forward, 4 backward; attention 4 x heads x head size per layer and visible key forward, twice that backward, what the mask
forbids left out for everybody; the head once forward, three times backward (both heads project again there). Ours
compares policy and reference on the first batch of each trial: with few steps that shows.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from benchmarks.common import Row
from benchmarks.sides import our_trainer, trl_trainer
from strategies.inference.scoring import PairScorer
from strategies.models.work import triangle

VOCABULARY = 512
"""Of the model that stands in: token ids are taken modulo this, which changes no count."""


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    parser = common.parser("sweep_cost", __doc__)
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args(arguments)
    options.micro_batch = options.batch
    common.quiet(options.threads)
    model, tokenizer = common.load(options)
    size = Size.of(model)
    rows = [
        {name: [token % VOCABULARY for token in ids] for name, ids in row.items()}
        for row in common.load_rows(options, tokenizer, options.steps * options.batch)
    ]
    sweeps = {
        "ours, scores cached": ours(rows, tokenizer, options, cached=True),
        "ours, reference live": ours(rows, tokenizer, options, cached=False),
        "TRL as it ships": trl(rows, tokenizer, options, "shipped"),
        "TRL at its best": trl(rows, tokenizer, options, "best"),
    }
    common.console().print(table_of(sweeps, size, len(rows), options))


@dataclass
class Count:
    """What went through a model in one kind of pass."""

    pairs: int = 0
    tokens: int = 0
    keys: float = 0.0
    """Keys that the tokens see, added up over the tokens."""
    projected: int = 0
    """Tokens that the head projects."""


@dataclass
class Meter:
    """Counts what goes through the models it is attached to."""

    trained: Count = field(default_factory=Count)
    scored: Count = field(default_factory=Count)
    layer_tokens: int = 0

    def attach(self, model: Any) -> Any:
        """Count from now on, in `model` and in copies of it; returns the model."""

        def count(module: Any, args: Any, kwargs: Any) -> None:
            add(self.trained if torch.is_grad_enabled() else self.scored, kwargs)

        def count_layer(module: Any, args: Any) -> None:
            self.layer_tokens += args[0].shape[:-1].numel()

        model.register_forward_pre_hook(count, with_kwargs=True)
        # A part of a layer: what checkpointing runs again goes through it again.
        model.base_model.layers[0].mlp.register_forward_pre_hook(count_layer)
        return model

    @property
    def recomputed_tokens(self) -> int:
        """Tokens that went through the layers again."""
        return self.layer_tokens - self.trained.tokens - self.scored.tokens


def add(count: Count, inputs: dict[str, Any]) -> None:
    """Add a forward pass, packed or padded, by what the model was called with."""
    sequences, length = inputs["input_ids"].shape
    count.tokens += sequences * length
    if "packed" in inputs:
        segments = inputs["packed"].segments
        count.pairs += len(segments)
        count.keys += sum(segment.keys for segment in segments)
        count.projected += inputs["scored_positions"].numel()
    else:
        count.pairs += sequences // 2
        count.keys += sequences * triangle(length)
        # On a CPU TRL's head projects every position but the last.
        count.projected += sequences * (length - 1)


def stand_in() -> LlamaForCausalLM:
    """A model through which tokens go fast."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=2**15, **size)
        return LlamaForCausalLM(config)


def ours(rows: list[Row], tokenizer: Any, options: argparse.Namespace, cached: bool) -> Meter:
    """Run the trials with our trainer, after scoring the pairs once where scores are cached."""
    meter = Meter()
    if cached:
        scorer = PairScorer(stand_in().eval(), 2 * options.sequence_len)
        meter.attach(scorer.model)
        rows = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip(rows, scorer.score(rows), strict=True)
        ]
    for trial in range(options.trials):
        with tempfile.TemporaryDirectory() as folder:
            trainer = our_trainer(stand_in(), tokenizer, rows, options, folder, learning_rate=1e-4 * (trial + 1))
            for model in (trainer.model, trainer.ref_model):
                if model is not None:
                    meter.attach(model)
            trainer.train()
    return meter


def trl(rows: list[Row], tokenizer: Any, options: argparse.Namespace, settings: str) -> Meter:
    """Run the trials with TRL's trainer; its precomputation is part of its work."""
    meter = Meter()
    for trial in range(options.trials):
        model = meter.attach(copy.deepcopy(stand_in()))
        with tempfile.TemporaryDirectory() as folder:
            rate = 1e-4 * (trial + 1)
            trl_trainer(model, tokenizer, rows, options, folder, settings, learning_rate=rate).train()
    return meter


@dataclass(frozen=True)
class Size:
    """What decides the operations of a model."""

    weights: int
    """Of the linear layers, without the head."""
    head: int
    key: int
    """Operations per visible key forward, over all layers."""

    @classmethod
    def of(cls, model: Any) -> Size:
        """Of a causal language model."""
        config = model.config.get_text_config()
        linear = [module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights=sum(module.weight.numel() for module in linear),
            head=model.get_output_embeddings().weight.numel(),
            key=4 * config.num_hidden_layers * config.num_attention_heads * head_size,
        )

    def operations(self, meter: Meter) -> float:
        """Of everything that the meter has counted."""
        trained, scored = meter.trained, meter.scored
        again = meter.recomputed_tokens / trained.tokens
        layers = sum(
            passes * (2 * self.weights * count.tokens + self.key * count.keys)
            for passes, count in ((3 + again, trained), (1, scored))
        )
        return layers + 2 * self.head * (4 * trained.projected + scored.projected)


def table_of(sweeps: dict[str, Meter], size: Size, pairs: int, options: argparse.Namespace) -> Table:
    """One row per way to run the sweep."""
    table = Table(
        title=f"{options.trials} trials of {options.steps} steps of {options.batch} pairs, operations of {options.model}"
    )
    names = "sweep|reference forwards a pair|scored tokens|trained tokens|recomputed|projected|TFLOP|of TRL shipped|of TRL best"
    for name in names.split("|"):
        table.add_column(name, justify="left" if name == "sweep" else "right")
    peers = [size.operations(sweeps[name]) for name in ("TRL as it ships", "TRL at its best")]
    for name, meter in sweeps.items():
        operations = size.operations(meter)
        projected = meter.trained.projected + meter.scored.projected
        table.add_row(
            name,
            f"{meter.scored.pairs / pairs:g}",
            *(f"{value:,}" for value in (meter.scored.tokens, meter.trained.tokens, meter.recomputed_tokens, projected)),
            f"{operations / 1e12:.1f}",
            *(f"{operations / peer:.2f}x" for peer in peers),
        )
    return table


if __name__ == "__main__":
    main()
