"""The best checkpoint becomes the model, whatever it is sharded by, also where each rank has a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from benchmarks.processes import free_port, spawn
from strategies.models.gather_weights import gather
from tests.laws.runs import LORA, built, join, prepared
from tests.laws.sharded import KINDS, resumable
from tests.tiny import save_tiny

# The loss falls, so the largest is that of the first checkpoint.
KEYS: dict[str, Any] = {
    "rl": "simpo",
    "micro_batch_size": 2,
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


@dataclass(frozen=True)
class Storage:
    """Of checkpoints that are fetched by a function."""

    fetch: Callable[[Path], Path]

    def wait(self) -> None: ...


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in gather(trainer.accelerator.unwrap_model(trainer.model))}


def worker(rank: int, world_size: int, port: int, folder: str, base: str) -> None:
    """Trains under every engine, each rank in a folder of its own; leaves the weights of step 3 and those at the end."""
    join(rank, world_size, port)
    for engine, kind in KINDS:
        place = Path(folder) / f"{engine}-{kind}"
        trainer = resumable(place / str(rank), engine, {**KEYS, **(LORA if kind == "lora" else {}), "base_model": base})
        fetched: list[str] = []

        def fetch(wanted: Path, place: Path = place, fetched: list[str] = fetched) -> Path:
            theirs = list((place / str(1 - rank) / wanted.name).iterdir())
            dist.barrier()
            fetched.append(wanted.name)
            for file in theirs:
                shutil.copy(file, wanted)
            dist.barrier()
            return wanted

        seen = []
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *args, trainer=trainer, seen=seen, evaluate=evaluate, **kwargs: (
            seen.append(weights(trainer)) or evaluate(*args, **kwargs)
        )
        trainer.checkpoint_storage = Storage(fetch)
        trainer.train()
        assert fetched == ["checkpoint-3"]
        assert len(seen) == 4
        end = weights(trainer)
        if rank == 0:
            save_file(seen[0], place / "first.safetensors")
            save_file(seen[-1], place / "last.safetensors")
            save_file(end, place / "end.safetensors")
        dist.barrier()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    spawn(worker, 2, 2, free_port(), str(folder), save_tiny(folder / "base"))
    return folder


@pytest.mark.parametrize(("engine", "kind"), KINDS)
def test_the_model_at_the_end_is_that_of_the_best_checkpoint(two_processes: Path, engine: str, kind: str) -> None:
    first, last, end = (
        load_file(two_processes / f"{engine}-{kind}" / f"{name}.safetensors") for name in ("first", "last", "end")
    )
    assert first.keys() == end.keys()
    for name in first:
        assert torch.equal(first[name], end[name]), name
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_a_best_checkpoint_that_was_damaged_is_not_the_model(tmp_path: Path) -> None:
    keys = {**KEYS, "save_strategy": "steps", "save_steps": 3, "num_epochs": 1.0}
    trainer = built(tmp_path, rows=prepared(17, keys), **keys)

    def damage(folder: Path) -> Path:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return folder

    trainer.checkpoint_storage = Storage(damage)
    with pytest.raises(ValueError, match="the best model can't be had: checkpoint-3 is damaged: model.safetensors has another"):
        trainer.train()


def test_the_best_checkpoint_stays_the_same_when_a_run_resumes(tmp_path: Path) -> None:
    """Of the evaluations the third is the best, but its step has no checkpoint."""
    metrics = {1: 5.0, 2: 3.0, 3: 1.0, 4: 2.0, 5: 4.0, 6: 4.0}
    cadence = {"eval_steps": 1, "save_strategy": "steps", "save_steps": 2, "num_epochs": 1.0, "greater_is_better": False}
    fetched: list[str] = []

    def fetch(folder: Path) -> Path:
        fetched.append(folder.name)
        return tmp_path / "run" / folder.name

    def build(folder: Path) -> Any:
        trainer = built(folder, rows=prepared(12, KEYS), **{**KEYS, **cadence})
        trainer.evaluate = lambda *_, **__: {"eval_loss": metrics[trainer.state.global_step]}
        trainer.checkpoint_storage = Storage(fetch)
        return trainer

    build(tmp_path / "run").train()
    build(tmp_path / "elsewhere").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert fetched == ["checkpoint-2", "checkpoint-2"]
