"""Runs under DDP, ZeRO and FSDP2, in two processes of one group or in one alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from transformers import set_seed

from cluster.config import ClusterKeys
from cluster.sharding import sharding_arguments
from strategies.config import as_config
from strategies.models import gather_weights as gathering
from strategies.models.gather_weights import gather
from strategies.models.loading import load_model
from strategies.models.saving import save_final
from strategies.models.sharding import zero3_init_context
from tests.laws.runs import CONFIG, built, join, losses, prepared, scored, trained
from tests.tiny import tiny_tokenizer

# What a model of billions of parameters meets: weights are let go after each use, and fetched a few at a time.
ROOM = {"stage3_max_live_parameters": 20_000, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10_000}


def _zero3() -> dict[str, Any]:
    """The preset, but as large models have it: several groups of weights that are stepped one by one, and no room for all."""
    config = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": 2}, "deepspeed": "zero3"}))["deepspeed"]
    return {**config, "zero_optimization": {**config["zero_optimization"], "sub_group_size": 20_000, **ROOM}}


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": "zero1"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": _zero3()},
    "fsdp2": {"fsdp_config": {}},
}
KINDS = [
    ("ddp", "full"),
    ("ddp", "lora"),
    ("zero1", "lora"),
    ("zero2", "full"),
    *((engine, kind) for engine in ("zero3", "fsdp2") for kind in ("full", "lora")),
]
"""Engines and what they train, of checkpoints: those of ZeRO-1 and ZeRO-2 are alike."""
REPORTED = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "logps/chosen",
    "entropy",
    "eval_loss",
    "eval_logps/chosen",
    "eval_rewards/margins",
    "num_tokens",
)


def run(folder: Path, engine: str, keys: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """Train the model in `keys["base_model"]` and save it in `folder`; returns what was logged, and what this rank held.

    Args:
        keys: of the config; also `rows` and `eval_rows`, how many, `cached`, whether they bring the reference, and
            `streamed`, whether the model is also written as `write_in_files` does.
    """
    keys = {"micro_batch_size": micro_batch_size, **keys}
    number, evaluated = keys.pop("rows", 16), keys.pop("eval_rows", 5)
    cached, streamed = keys.pop("cached", False), keys.pop("streamed", False)
    rows, eval_rows = prepared(number, keys), prepared(evaluated, keys)
    tokenizer = tiny_tokenizer()
    cfg = as_config({**CONFIG, **keys})
    if cached:
        with zero3_init_context(cfg, {}):
            reference = load_model(cfg, tokenizer)
        rows, eval_rows = scored(rows, reference), scored(eval_rows, reference)
    sharding = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": 2}, **ENGINES[engine]}))
    set_seed(7)
    with zero3_init_context(cfg, sharding):
        model = load_model(cfg, tokenizer)
    trainer = trained(folder, rows=rows, eval_rows=eval_rows, model=model, extra=sharding, **keys)
    save_final(trainer, tokenizer, folder / "model")
    if streamed:
        write_in_files(trainer, folder / "streamed")
    found: dict[str, Any] = {name: losses(trainer, name) for name in REPORTED}
    return {**found, "type": str(trainer.accelerator.distributed_type.value), **held(trainer)}


def write_in_files(trainer: Any, folder: Path) -> None:
    """Write the model parameter by parameter, in several files, which takes one that transformers needn't translate."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model._weight_conversions = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "FILE_BYTES", 100_000)
        gathering.write_whole(model, folder, trainer.is_world_process_zero())


def resume_worker(
    rank: int, world_size: int, port: int, folder: str, runs: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]]
) -> None:
    """Trains every run, and from checkpoints of its own and of others' once more; leaves the weights.

    Args:
        runs: engine, keys, and the folders below `folder` whose checkpoint of step 3 to resume from.
    """
    if world_size > 1:
        join(rank, world_size, port)
    for name, (engine, keys, places) in runs.items():
        resumed = {place: f"{folder}/{place}/checkpoint-3" for place in places}
        for run, checkpoint in {"quiet": None, **resumed}.items():
            trainer = resumable(Path(folder) / (name if checkpoint is None else f"{name}-again"), engine, keys)
            trainer.train(resume_from_checkpoint=checkpoint)
            state = {key: value.detach().clone() for key, value in gather(trainer.accelerator.unwrap_model(trainer.model))}
            if rank == 0:
                save_file(state, f"{folder}/{name}-{run}.safetensors")


def resumable(folder: Path, engine: str, keys: dict[str, Any]) -> Any:
    """A trainer of 12 steps, 6 an epoch, that saves at every third."""
    tokenizer = tiny_tokenizer()
    saved = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "num_epochs": 2.0, "tokens_per_forward": 100}
    saved |= {"eval_steps": 3}
    cfg = as_config({**CONFIG, **saved, **keys})
    sharding = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": 2}, **ENGINES[engine]}))
    set_seed(7)
    with zero3_init_context(cfg, sharding):
        model = load_model(cfg, tokenizer)
    return built(folder, rows=prepared(23, keys), model=model, extra=sharding, **{**saved, **keys})


def held(trainer: Any) -> dict[str, int]:
    """Numbers of a rank's own: elements of the parameters that it keeps, and of its optimizer's state."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"parameters": sum(map(_own, model.parameters())), "state": sum(map(_own, _states(trainer.optimizer)))}


def _states(optimizer: Any) -> list[torch.Tensor]:
    while not isinstance(getattr(optimizer, "state", None), dict) or not optimizer.state:
        optimizer = optimizer.optimizer
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def _own(tensor: Any) -> int:
    """Elements of this rank: of a part that ZeRO-3 or FSDP2 has left it, or of a whole tensor."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.numel()
    return tensor.to_local().numel() if hasattr(tensor, "to_local") else tensor.numel()


def unpatched() -> str:
    """What accelerate by itself makes of FSDP2 on a CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    return str(accelerator.distributed_type.value)


def worker(rank: int, world_size: int, port: int, folder: str, runs: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """One process of a gloo group; rank 0 leaves `{name}.json` of every run."""
    join(rank, world_size, port)
    for name, (engine, keys) in runs.items():
        found = run(Path(folder) / name, engine, keys, micro_batch_size=2)
        if rank == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps(found))
    Path(folder, "unpatched").write_text(unpatched())
