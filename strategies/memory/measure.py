"""Two optimizer steps of the worst case in a fresh process, and the memory that they took.

`python -m strategies.memory.measure` reads a config as JSON on stdin and prints a `Measured` as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from strategies.builder import HFRLTrainerBuilder
from strategies.config import StrategyConfig, as_config, with_strategy_keys
from strategies.config.trainer import TrackerKeys
from strategies.memory.worst_case import worst_lengths
from strategies.methods.registry import get_strategy
from strategies.models.loading import load_model
from strategies.models.location import local_values
from strategies.models.tokenizer import load_tokenizer
from strategies.packing.support import why_not_packed

__all__ = ["Measured", "measure_peak"]

MEASURABLE = ("pair", "unpaired")
STEPS = 2
"""The optimizer has no state before the first has ended."""
UNWATCHED = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    **dict.fromkeys(
        "save_steps saves_per_epoch eval_steps evals_per_epoch load_best_model_at_end early_stopping_patience hub_model_id "
        "metric_for_best_model".split()
    ),
    **dict.fromkeys(TrackerKeys.model_fields),
}
"""Keys of a measured run that have nothing to do with memory, but for the accumulation: its gradients are part of the peak."""
WITH_TRAINER = "deepspeed"
"""What accelerate imports when a trainer is made; no part of what the model takes."""


@dataclass(frozen=True)
class Measured:
    """Bytes: of the process (resident) on a CPU, allocated by torch on a GPU."""

    base: int
    """Before there was a model, with all libraries loaded."""
    loading: int
    """Most while the model was loaded."""
    training: int
    """Most in two steps."""
    tokens: int
    """Fed per forward."""
    seconds: float
    """Of the steps."""
    gpu: bool

    @property
    def peak(self) -> int:
        return max(self.loading, self.training)


def measure_peak(cfg: Any, preload: Sequence[str] = ()) -> Measured:
    """Train two steps of the largest forwards on random tokens, in a process of its own.

    Args:
        cfg: a validated config; weights are loaded from where it says.
        preload: names of further modules that a worker has loaded.

    Raises:
        ValueError: for a method that generates what it trains on.
        RuntimeError: when the process fails, with its last line, or was killed.
    """
    strategy = get_strategy(cfg.rl)
    if strategy.batch_kind not in MEASURABLE:
        raise ValueError(f"--measure: rl: {cfg.rl} generates what it trains on, and that is not measured here; leave it out")
    # `StrategyConfig` refuses keys of other packages, such as those of the data.
    own = {
        name: value
        for name, value in cfg.model_dump(exclude_unset=True, mode="json").items()
        if name in with_strategy_keys(StrategyConfig).model_fields
    }
    if strategy.reference_mode(cfg) is not None and strategy.batch_kind == "pair":
        # Resolved here: `_rows` makes scores for a cached reference, and the builder decides by the rows where it isn't set.
        own["reference"] = strategy.reference_mode(cfg)
    own |= local_values(cfg)
    # The process must find this package wherever it is started, also when it isn't installed.
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.run(
        [sys.executable, "-m", "strategies.memory.measure"],
        input=json.dumps({"cfg": own, "preload": list(preload)}),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"killed by signal {-process.returncode}; was memory exhausted?"])[-1]
        raise RuntimeError(f"--measure: the measured process ended with status {process.returncode}: {last}")
    # The last line: libraries print as well.
    return Measured(**json.loads(process.stdout.strip().splitlines()[-1]))


def _train(values: dict[str, Any]) -> Measured:
    cfg = as_config(values)
    kind = get_strategy(cfg.rl).batch_kind
    base = _resident()
    tokenizer = load_tokenizer(cfg)
    model = load_model(cfg, tokenizer)
    # Before the trainer is made, from the start of the process: loading may hold weights twice.
    loading = _peak()
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.model_copy(update={**UNWATCHED, "output_dir": folder})
        rows, cfg = _rows(cfg, kind, model)
        builder = HFRLTrainerBuilder(cfg, model, tokenizer)
        builder.train_dataset = rows
        trainer = builder.build(STEPS)
        trainer.starts_at_reference = False  # scores are made up
        fed = []
        if kind == "pair":
            fed = [batch.fed_tokens for batch in next(iter(trainer.get_train_dataloader())).batches]
        # Loading's peak may exceed training's, which would then not be seen.
        _forget_peak()
        start = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - start
    gpu = torch.cuda.is_available()
    training = torch.cuda.max_memory_allocated() if gpu else _peak()
    tokens = max(fed, default=cfg.micro_batch_size * cfg.sequence_len)
    return Measured(0 if gpu else base, 0 if gpu else loading, training, tokens, seconds, gpu)


def _rows(cfg: Any, kind: str, model: Any) -> tuple[list[dict[str, Any]], Any]:
    """Rows of two full forwards per step, and the config whose global batch they are."""
    packed = kind == "pair" and cfg.sample_packing and why_not_packed(model, cfg.sequence_len) is None
    lengths = worst_lengths(cfg, packed)
    # With two accumulated, a global batch has as many rows as two full forwards; the plan's shuffle may mix their lengths.
    cfg = cfg.model_copy(update={"micro_batch_size": len(lengths)})
    draw = random.Random(0)
    vocabulary, scored = model.get_input_embeddings().num_embeddings, cfg.reference == "cached"

    def ids(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    rows: list[dict[str, Any]] = []
    for number in range(2 * STEPS):
        for prompt, chosen, rejected in lengths:
            if kind == "unpaired":
                rows.append({"prompt_ids": ids(prompt), "completion_ids": ids(chosen), "label": number % 2 == 0})
                continue
            row: dict[str, Any] = {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}
            if scored:
                # Any finite numbers, one per token, pass `check_scores`.
                row |= {"ref_chosen_logps": chosen * [-9.0], "ref_rejected_logps": rejected * [-9.0]}
            rows.append(row)
    return rows, cfg


def _status(name: str) -> int:
    """Bytes, of a line of /proc/self/status; the process' most ever where there is no such file."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]) * 1024


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _forget_peak() -> None:
    """Start `_peak` again from what is resident now, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # 5 resets VmHWM to what is resident (proc(5)); elsewhere the peak since the start of the process stays.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for module in (*given["preload"], WITH_TRAINER):
        importlib.import_module(module)
    print(json.dumps(asdict(_train(given["cfg"]))))
