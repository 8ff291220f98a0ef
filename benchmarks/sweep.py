"""`python -m benchmarks.sweep`: a sweep by ASHA against as many whole runs of TRL's `DPOTrainer`, one after the other.

Both train the same model on the same real pairs for the same number of epochs, and evaluate it on the same pairs: TRL at
the end, the sweep four times a run, since it decides by that. TRL's runs are those of the sweep's own configurations, drawn
at random, each in a process of its own as a person would start it; ours is `prefray tune`, all of it: Ray's start, preparing,
scoring, the trials, the report. Both use all CPUs: TRL with a thread for each, the sweep with a trial for each.

With `--adapter lora` both train LoRA of the same rank; our trials share one base, and a second sweep shows the time without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks import common
from benchmarks.common import DATA, MODEL, SHAPE
from pipeline.config import RunConfig, parse_config
from pipeline.tuning.folder import SweepFolder, recipe_text
from pipeline.tuning.search import drawn_points

LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
METRIC = "eval_rewards/accuracies"
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""A model at which one run of TRL takes a minute or more on two cores."""


def main(arguments: list[str] | None = None) -> None:
    """Run both sides and print the ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--rows", type=int, default=130, help="pairs, of which a fifth is for evaluation")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--adapter", choices=["lora"], help="train adapters; all weights when not set")
    parser.add_argument("--model", help="base_model; a small one with random weights when not set")
    parser.add_argument("--sequence-len", type=int, default=256)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--peer-runs", type=int, help="of TRL, whose mean then stands for the others; all when not set, 0 for none"
    )
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.trl is not None:
        run_trl(json.loads(options.trl.read_text()))
        return
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """The sweep, then TRL's runs."""
    cfg = recipe(options, folder, "sweep", "auto")
    ours = run_sweep(cfg, folder)
    records = SweepFolder(folder / "sweep").records()
    assert cfg.tune is not None
    # It prepares and scores for itself, as the first one did.
    alone = run_sweep(recipe(options, folder, "sweep-alone", False), folder) if options.adapter else None
    points = drawn_points(cfg.tune, cfg.seed) or []
    peers = [trl_run(folder, cfg, number, values) for number, values in enumerate(points[: options.peer_runs])]
    # Without peers, ratios are those to our own sweep.
    seconds = sum(found["seconds"] for found in peers) / len(peers) * len(points) if peers else alone or ours
    table = Table(title=f"{len(points)} configurations, {options.epochs} epochs of {options.rows} pairs")
    for name in ("", "seconds", "of TRL" if peers else "ratio", f"best {METRIC}", "steps"):
        table.add_column(name, justify="left" if not name else "right")
    best = max(record.metrics[METRIC] for record in records if record.status == "finished")
    steps = f"{sum(record.step for record in records)} of {sum(record.total_steps for record in records)}"
    table.add_row("prefray tune, asha", f"{ours:.0f}", f"{ours / seconds:.2f}x", f"{best:.3f}", steps)
    if alone is not None:
        table.add_row("the same without sharing", f"{alone:.0f}", f"{alone / seconds:.2f}x", "", "")
    if peers:
        measured = "" if len(peers) == len(points) else f", of which {len(peers)} measured"
        theirs = max(found[METRIC] for found in peers)
        table.add_row(f"TRL, {len(points)} whole runs{measured}", f"{seconds:.0f}", "1.00x", f"{theirs:.3f}", "all")
    common.console().print(table)
    if peers:
        print("seconds of TRL's runs:", ", ".join(f"{found['seconds']:.0f}" for found in peers))
        print("accuracies of TRL's runs:", ", ".join(f"{found[METRIC]:.3f}" for found in peers))
    print("trials:", ", ".join(f"{one.number} {one.status} {one.metrics.get(METRIC, float('nan')):.3f}" for one in records))
    print("Ray's processes that are left:", left_over() or "none")
    print(common.machine(os.cpu_count() or 1))


def run_sweep(cfg: RunConfig, folder: Path) -> float:
    """Run a sweep in a process of its own, as a person would start it; return its seconds."""
    (folder / "recipe.yaml").write_text(recipe_text(cfg))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipeline", "tune", str(folder / "recipe.yaml"), "--quiet"], check=True)
    return time.perf_counter() - began


def left_over() -> list[str]:
    """Command lines of processes that a sweep has left."""
    return [line for process in psutil.process_iter() if "ray::" in (line := _line(process)) or "raylet" in line]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def recipe(options: argparse.Namespace, folder: Path, name: str, share_base: Any) -> RunConfig:
    """The sweep's, in the folder `name`."""
    base = options.model or small_model(folder / "model")
    rows = json.loads(options.data.read_text())[: options.rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    return parse_config(
        {
            "base_model": base,
            "datasets": [{"path": str(folder / "rows.json"), **SHAPE}],
            "val_set_size": len(rows) // 5,
            "dataset_prepared_path": str(folder / f"{name}-prepared"),
            **(LORA if options.adapter else {}),
            "sequence_len": options.sequence_len,
            "excess_length_strategy": "truncate",
            "max_rejected_fraction": 0.5,
            "micro_batch_size": options.batch,
            "num_epochs": options.epochs,
            "evals_per_epoch": 2,
            "save_strategy": "no",
            "output_dir": str(folder / name),
            "tune": {
                "space": {
                    "learning_rate": {"loguniform": [1e-4, 1e-2]},
                    "rl_beta": {"choice": [0.05, 0.1, 0.3]},
                },
                "scheduler": "asha",
                "num_samples": options.trials,
                "baseline": False,
                "share_base": share_base,
            },
        }
    )


def small_model(folder: Path) -> str:
    """A model of random weights with the tokenizer of a real one."""
    options = common.parser("sweep", None).parse_args(["--model", MODEL])
    tokenizer = common.load(options)[1]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trl_run(folder: Path, cfg: RunConfig, number: int, values: dict[str, Any]) -> dict[str, Any]:
    """One run of TRL in its own process."""
    job = {
        "model": cfg.base_model,
        "rows": str(next(Path(cfg.dataset_prepared_path).glob("*/manifest.json")).parent),
        "batch": cfg.micro_batch_size,
        "epochs": cfg.num_epochs,
        "length": cfg.sequence_len,
        "learning_rate": values["learning_rate"],
        "beta": values["rl_beta"],
        "adapter": cfg.adapter,
        "folder": str(folder / f"trl-{number}"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "benchmarks.sweep", "--trl", str(folder / "job.json")], check=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, **json.loads((folder / f"trl-{number}" / "metrics.json").read_text())}


def run_trl(job: dict[str, Any]) -> None:
    """TRL as it ships, on the pairs that were prepared: it needs not tokenise."""
    common.quiet(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    args = DPOConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=job["batch"],
        per_device_eval_batch_size=job["batch"],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        beta=job["beta"],
        max_length=job["length"],
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # a part of all steps
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
    )
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    train, evaluate = (Dataset.from_parquet(f"{job['rows']}/{split}/*.parquet", columns=columns) for split in ("train", "eval"))
    trainer = _PreparedDPOTrainer(
        model,
        None,
        args,
        train_dataset=train,
        eval_dataset=evaluate,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if job["adapter"] else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate()
    Path(job["folder"]).mkdir(exist_ok=True)
    (Path(job["folder"]) / "metrics.json").write_text(json.dumps({METRIC: metrics[METRIC]}))


class _PreparedDPOTrainer(DPOTrainer):
    """TRL's trainer on rows that are tokenised already."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


if __name__ == "__main__":
    main()
