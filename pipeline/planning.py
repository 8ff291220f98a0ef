"""Plan and checks of a run before anything starts: its recipe, its workers, its batches; and before it scores, its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.placement import WorkerPlan, plan_workers
from cluster.sharding import is_own, sharding_arguments
from pipeline.config import RunConfig
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import EVAL, TRAIN
from pipeline.errors import UserError
from pipeline.io.cache import NodeCache
from pipeline.io.remote_models import fetch_models
from strategies import models
from strategies.config.schedule import steps_per_epoch, total_steps
from strategies.methods.registry import get_strategy
from strategies.models.config import load_config
from strategies.models.location import ADAPTER_CONFIG, ModelLocation, is_remote, resolve_model_location
from strategies.models.tokenizer import check_reads_tokens, load_tokenizer

if TYPE_CHECKING:
    from pipeline.data.store import Prepared
    from strategies.methods.base import Strategy
    from strategies.types import ReferenceMode

__all__ = ["RunPlan", "check_batch", "check_cache", "check_recipe", "plan_run", "resolve", "resolve_bf16", "row_bytes"]

PER_LIST, PER_ROW = 4, 8
"""Bytes in Arrow: offset of a list, id of a row."""


@dataclass(frozen=True)
class RunPlan:
    """What is decided about a run before its data are prepared; the stages after that take it."""

    recipe: RunConfig
    """The recipe, its paths absolute: what the run's folder keeps, and what a resumed run is compared with."""
    cfg: RunConfig
    """The recipe with its precision resolved, as this run computes."""
    workers: WorkerPlan
    strategy: type[Strategy]
    """The strategy of `rl`."""
    reference: ReferenceMode | None
    """Source of the reference's log-probabilities; None without a reference."""

    def total_steps(self, rows: int) -> int:
        """Return the optimizer steps of the run over `rows` training rows."""
        return total_steps(rows, self.cfg, self.workers.num_workers)

    def steps_per_epoch(self, rows: int) -> int:
        """Return the optimizer steps of one epoch over `rows` training rows."""
        return steps_per_epoch(rows, self.cfg, self.workers.num_workers)


def resolve(cfg: RunConfig, nodes: list[dict[str, float]]) -> RunPlan:
    """Decide the workers of a run, the precision that they compute in, and where the reference's values come from.

    Args:
        cfg: the recipe, its paths absolute.
        nodes: total resources of each node.

    Raises:
        ValueError: when the workers don't fit; UserError: for batch sizes that don't work with their number.
    """
    workers = plan_run(cfg, nodes)
    check_batch(cfg, workers.num_workers)
    # Workers with GPUs resolve it themselves; those on CPUs, which may differ, would not all agree.
    resolved = resolve_bf16(cfg) if cfg.bf16 == "auto" and not workers.use_gpu else cfg
    strategy = get_strategy(cfg.rl)
    return RunPlan(cfg, resolved, workers, strategy, strategy.reference_mode(resolved))


def resolve_bf16(cfg: RunConfig) -> RunConfig:
    """Return the config with `bf16: auto` resolved by this machine's CPU, so that all workers without a GPU agree."""
    return models.resolve_bf16(cfg, lambda: getattr(load_config(cfg).get_text_config(), "hidden_size", None))


def check_recipe(cfg: RunConfig) -> None:
    """Check models, method and sharding of a recipe, which would otherwise fail in every worker.

    Raises:
        UserError: naming the key.
    """
    fetch_models(cfg)
    _check_models(cfg)
    _check_method(get_strategy(cfg.rl), cfg)
    _check_sharding(cfg)


def plan_run(cfg: RunConfig, nodes: list[dict[str, float]]) -> WorkerPlan:
    """Decide the workers of a run.

    Args:
        nodes: total resources of each node.

    Raises:
        ValueError: when they don't fit.
    """
    least = cfg.min_workers if cfg.is_elastic else None
    return plan_workers(cfg.num_workers, cfg.ray.use_gpu, cfg.worker_resources(), nodes, least)


def check_batch(cfg: RunConfig, num_workers: int) -> None:
    """Check the batch sizes against the number of workers.

    Raises:
        UserError: naming the key.
    """
    if problems := [f"{path}: {text}" for path, text in get_strategy(cfg.rl).find_batch_problems(cfg, num_workers)]:
        raise UserError("\n".join(problems))


def check_cache(cfg: RunConfig, prepared: Prepared) -> None:
    """Check that `ray.cache_size` holds the rows, before they are scored; workers check again, by what they bring.

    Raises:
        UserError: when it doesn't.
    """
    cache = NodeCache.of(cfg.ray)
    # Prompts are kept as JSON, of another size than their ids.
    if cache.limit is None or prepared.manifest["kind"] == "prompt":
        return
    scores = " and their scores" if get_strategy(cfg.rl).reference_mode(cfg) == "cached" else ""
    cache.check_limit(f"the rows{scores}", row_bytes(cfg, prepared)[0])


def row_bytes(cfg: RunConfig, prepared: Prepared) -> tuple[int, int]:
    """Return the bytes of the columns that training reads, with the reference's cached log-probabilities, and the tokens."""
    size = tokens = 0
    is_scored = get_strategy(cfg.rl).reference_mode(cfg) == "cached"
    names = [f"{name}_length" for name in ("prompt", *COMPLETIONS[prepared.manifest["kind"]])]
    for lengths in (table for split in (TRAIN, EVAL) for table in prepared.tables(split, names)):
        of_each = {name: int(lengths[name].to_numpy().sum()) for name in names}
        answers = sum(count for name, count in of_each.items() if name != "prompt_length")
        # 4 bytes for each token id, and for each cached log-probability, of which prompts have none.
        # One offset per list: ids of each text, log-probabilities of each completion.
        lists = len(names) + (len(names) - 1) * is_scored
        tokens += sum(of_each.values())
        size += 4 * (sum(of_each.values()) + answers * is_scored) + lengths.num_rows * (lists * PER_LIST + PER_ROW)
    return size, tokens


def _check_models(cfg: RunConfig) -> None:
    for key in ("base_model", "reference_model", "lora_model_dir"):
        if getattr(cfg, key) is not None:
            location = resolve_model_location(getattr(cfg, key), key)
            if key != "lora_model_dir":
                _check_base_of(location)
    try:
        if cfg.adapter is not None or cfg.lora_model_dir is not None:
            models.check_adapter(cfg)
        if cfg.reference_model is not None:
            check_reads_tokens(cfg, load_tokenizer(cfg), cfg.reference_model)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_base_of(location: ModelLocation) -> None:
    """Refuse an adapter in a model's place whose base is at a URI: transformers looks for it there itself."""
    file = Path(location.path, ADAPTER_CONFIG)
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if base and is_remote(base):
        raise UserError(
            f"{location.key}: {location.given!r} is an adapter, and its base is at a URI, {base!r}; "
            + (
                "give that one, and lora_model_dir for the adapter"
                if location.key == "base_model"
                else "merge it: prefray merge"
            )
        )


def _check_method(strategy: type[Strategy], cfg: RunConfig) -> None:
    """Load the method's objects, such as reward functions, as every worker will."""
    try:
        strategy.set_trainer_kwargs(cfg)
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_sharding(cfg: RunConfig) -> None:
    """Validate a custom sharding config with DeepSpeed or FSDP2, as every worker will."""
    if not is_own(cfg):
        return
    if problems := [f"{path}: {message}" for path, message in models.find_problems(cfg, sharding_arguments(cfg))]:
        raise UserError("\n".join(problems))
