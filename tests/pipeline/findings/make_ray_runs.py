"""`python -m tests.pipeline.findings.make_ray_runs` trains one good run and five spoiled ones, and prints what a user sees.

The records of each go to `runs/ray-*.jsonl`, with the rows and the reference's scores that rules look at: tests read them.
The model is tiny, and has first been trained on the chosen answers of the demo's pairs; a run takes some seconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from pipeline import train
from pipeline.cli.execution import print_result
from pipeline.config import parse_config
from pipeline.findings.facts import read_facts
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from tests.pipeline.findings.make_runs import base_model, pairs_of_demo, write_run
from tests.tiny import save_tiny, tiny_tokenizer

__all__ = ["RUNS"]

RECIPE: dict[str, Any] = {
    "learning_rate": 2e-4,
    "warmup_steps": 4,
    "sequence_len": 256,
    "micro_batch_size": 8,
    "max_steps": 40,
    "logging_steps": 1,
    "eval_steps": 10,
    "bf16": False,
}
RUNS: dict[str, dict[str, Any]] = {
    "good": {},
    "rate-times-100": {"learning_rate": 2e-2},
    "rate-zero": {"learning_rate": 1e-14},
    "labels-flipped": {
        "datasets": [{"path": "flipped_train.jsonl"}],
        "test_datasets": [{"path": "flipped_held_out.jsonl"}],
    },
    "wrong-reference": {"reference_model": "other"},
    "small-evaluation": {"test_datasets": [{"path": "six.jsonl"}]},
}
"""Name of a run -> its keys; the files and folders are those that `write_files` writes."""


def write_files(folder: Path) -> dict[str, Any]:
    """Write data and models, and return the keys that all recipes have."""
    train_pairs, held_out = pairs_of_demo(False), pairs_of_demo(True)
    files = {"train": train_pairs, "held_out": held_out, "six": held_out[:6]}
    for name in ("train", "held_out"):
        files[f"flipped_{name}"] = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in files[name]]
    for name, pairs in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    base_model(sides=("chosen",)).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    save_tiny(folder / "other", seed=5)
    return {
        "base_model": "base",
        "datasets": [{"path": "train.jsonl"}],
        "test_datasets": [{"path": "held_out.jsonl"}],
        "dataset_prepared_path": "prepared",
    }


def main() -> None:
    """Run all, and write their records."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = write_files(folder)
        for name, keys in RUNS.items():
            cfg = parse_config(_located({**files, **RECIPE, **keys, "output_dir": name}, folder))
            print(f"\n$ prefray train {name}.yaml", flush=True)
            result = train(cfg, report=False)
            print_result(result)
            run = RunFolder(str(result.run_dir))
            facts = read_facts(run, cfg, run.state() or {}, records := MetricsFile(run.metrics).read())
            write_run(f"ray-{name}", {**RECIPE, **keys}, records, facts)


def _located(keys: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe whose files are in a folder."""
    names = ("base_model", "reference_model", "dataset_prepared_path", "output_dir")
    paths = {name: str(folder / keys[name]) for name in names if name in keys}
    rows = {name: [{"path": str(folder / keys[name][0]["path"])}] for name in ("datasets", "test_datasets")}
    return {**keys, **paths, **rows}


if __name__ == "__main__":
    main()
