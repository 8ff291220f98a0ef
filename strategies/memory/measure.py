"""Two optimizer steps of the worst case in a fresh process, and the memory that they took.

`python -m strategies.memory.measure` reads a config as JSON on stdin and prints a `Measured` as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strategies.config.trainer import TrackerKeys

__all__ = ["Measured", "measure"]

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


@dataclass(frozen=True)
class Measured:
    """Bytes: of the process (resident) on a CPU, allocated by torch on a GPU."""

    base: int
    """Before there was a model."""
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


def measure(cfg: Any, preload: Sequence[str] = ()) -> Measured:
    """Train two steps of the largest forwards on random tokens, in a process of its own.

    Args:
        cfg: a validated config; weights are loaded from where it says.
        preload: names of further modules that a worker has loaded.

    Raises:
        ValueError: for a method that generates what it trains on.
        RuntimeError: when the process fails, with its last line, or was killed.
    """
    from strategies.config import StrategyConfig
    from strategies.registry import get_strategy

    strategy = get_strategy(cfg.rl)
    if strategy.batch_kind not in MEASURABLE:
        raise ValueError(f"--measure: rl: {cfg.rl} generates what it trains on, and that is not measured here; leave it out")
    own = {
        name: value
        for name, value in cfg.model_dump(exclude_unset=True, mode="json").items()
        if name in StrategyConfig.model_fields
    }
    if strategy.reference_mode(cfg) is not None and strategy.batch_kind == "pair":
        own["reference"] = strategy.reference_mode(cfg)
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
    return Measured(**json.loads(process.stdout.strip().splitlines()[-1]))


def _train(values: dict[str, Any]) -> Measured:
    import time

    import torch

    from strategies.builder import HFRLTrainerBuilder
    from strategies.config import as_config
    from strategies.models import load_model
    from strategies.registry import get_strategy
    from strategies.tokenizer import load_tokenizer

    cfg = as_config(values)
    kind = get_strategy(cfg.rl).batch_kind
    base = _resident()
    tokenizer = load_tokenizer(cfg)
    model = load_model(cfg, tokenizer)
    loading = _peak()
    with tempfile.TemporaryDirectory() as folder:
        cfg = cfg.model_copy(update={**UNWATCHED, "output_dir": folder})
        rows, cfg = _rows(cfg, kind, model)
        builder = HFRLTrainerBuilder(cfg, model, tokenizer)
        builder.train_dataset = rows
        trainer = builder.build(STEPS)
        fed = []
        if kind == "pair":
            fed = [batch.pairs.fed_tokens for batch in next(iter(trainer.get_train_dataloader())).batches]
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
    import random

    from strategies.memory.step import worst_lengths
    from strategies.packing.support import why_not_packed

    packed = kind == "pair" and cfg.sample_packing and why_not_packed(model, cfg.sequence_len) is None
    lengths = worst_lengths(cfg, packed)
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
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for module in given["preload"]:
        importlib.import_module(module)
    print(json.dumps(asdict(_train(given["cfg"]))))
