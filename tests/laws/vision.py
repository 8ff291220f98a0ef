"""Runs on pairs about pictures, whose losses the laws compare: in one process, or in two of one group."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import set_seed

from cluster.config import ClusterKeys
from cluster.sharding import sharding_arguments
from strategies import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.dataset_rows import REFERENCE_COLUMNS, as_dataset
from strategies.inference.scoring import PairScorer
from strategies.models.loading import load_model
from strategies.models.sharding import zero3_init_context
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise
from tests.laws.runs import CONFIG, join, losses
from tests.laws.sharded import ENGINES, REPORTED
from tests.tiny_vision import FAMILIES, Vision, labelled_pictures, picture_pairs, vision_trained

__all__ = ["engine_run", "prepared_pictures", "raw_pictures", "scored_pictures", "trained_on", "worker"]


def raw_pictures(number: int, rl: str = "dpo") -> list[dict[str, Any]]:
    """Rows about pictures, every fourth without one."""
    rows = labelled_pictures(number) if rl == "kto" else picture_pairs(number)
    for row in rows[3::4]:
        row["images"] = []
        (turn,) = row["prompt"]
        row["prompt"] = [{**turn, "content": [part for part in turn["content"] if part["type"] != "image"]}]
    return rows


def prepared_pictures(vision: Vision, number: int, rl: str = "dpo") -> list[dict[str, Any]]:
    """`raw_pictures` as prepared rows."""
    processing = VisionProcessing(vision.processor)
    rows = []
    for index, row in enumerate(raw_pictures(number, rl)):
        label = {"label": row["label"]} if "label" in row else {}
        rows.append({**tokenise(row, processing), **label, "images": row["images"], "row_id": index})
    return rows


def scored_pictures(rows: list[dict[str, Any]], vision: Vision, budget: int = 900) -> list[dict[str, Any]]:
    """The rows with the log-probabilities of a copy of the model."""
    scorer = PairScorer(copy.deepcopy(vision.model).eval(), budget, vision=VisionProcessing(vision.processor))
    # As rows of a table, whose pictures are encoded.
    scores = scorer.score(list(as_dataset(rows, "rows")))
    return [{**row, **dict(zip(REFERENCE_COLUMNS, pair, strict=True))} for row, pair in zip(rows, scores, strict=True)]


def trained_on(folder: Path, family: str, rows: Any, **keys: Any) -> Any:
    """Train a fresh model of the family on these rows; returns the trainer."""
    return vision_trained(folder, FAMILIES[family](), rows=rows, **keys)


def engine_run(folder: Path, vision: Vision, base: str, engine: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train the model in the folder `base`, whose processor is that of `vision`, by the engine; return the log."""
    processor, keys = vision.processor, dict(keys)
    rows, eval_rows = (prepared_pictures(vision, number, keys.get("rl", "dpo")) for number in (keys.pop("rows", 14), 5))
    keys = {**CONFIG, "base_model": base, "output_dir": str(folder), "sequence_len": 512, **keys}
    cfg = as_config(keys)
    sharding = sharding_arguments(ClusterKeys.model_validate({"ray": {"num_workers": 2}, **ENGINES[engine]}))
    set_seed(7)
    with zero3_init_context(cfg, sharding):
        model = load_model(cfg, processor.tokenizer)
    builder = HFRLTrainerBuilder(keys, model, processor.tokenizer, processor)
    builder.extra_arguments = sharding
    builder.train_dataset, builder.eval_dataset = rows, eval_rows
    trainer = builder.build()
    trainer.train()
    return {name: losses(trainer, name) for name in REPORTED}


def worker(rank: int, world_size: int, port: int, folder: str, runs: dict[str, tuple[str, str, str, dict[str, Any]]]) -> None:
    """One process of a gloo group; rank 0 leaves `{name}.json` of every run."""
    join(rank, world_size, port)
    # Before ZeRO-3, which divides every model that is made from then on.
    visions = {family: FAMILIES[family]() for family, *_ in runs.values()}
    for name, (family, base, engine, keys) in runs.items():
        found = engine_run(Path(folder) / name, visions[family], base, engine, {**keys, "micro_batch_size": 2})
        if rank == 0:
            (Path(folder) / f"{name}.json").write_text(json.dumps(found))
