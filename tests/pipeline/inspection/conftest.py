"""Prepared data with scores of a reference, made without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from pipeline.data import Prepared, prepare
from pipeline.data.store import prepared_root
from pipeline.inspection.parts import parts_of
from pipeline.io.digests import written
from pipeline.ray.tasks import run_here
from pipeline.reference import Scores
from pipeline.reference.plan import make_plan
from pipeline.reference.precision import resolve_precision
from pipeline.reference.score_files import write_scores
from pipeline.reference.score_store import open_scores
from strategies.inference.scoring import PairScorer
from tests.recipes import Recipe

__all__ = ["prepared_of", "recipe_of", "scored"]


def recipe_of(base_model: str, folder: Path, rows: Sequence[dict[str, Any]], **keys: Any) -> RunConfig:
    """A recipe over raw rows, which are written into the folder, with what is prepared of them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "base_model": base_model,
        "datasets": [{"path": str(folder / "rows.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "run"),
        "sequence_len": 256,
        "bf16": False,
    }
    return parse_config({**common, **keys})


def prepared_of(cfg: RunConfig) -> Prepared:
    return prepare(cfg, executor=run_here)


def scored(cfg: RunConfig, prepared: Prepared, model: Any) -> Scores:
    """The scores that `score` would leave of this reference, computed in this process."""
    hidden = cfg.ray.score.hidden_states
    scorer = PairScorer(model.eval(), 2 * cfg.sequence_len, keep_hidden=hidden)
    plan = make_plan(cfg, prepared, resolve_precision(cfg, use_gpu=False))
    folder = prepared_root(cfg.dataset_prepared_path).subfolder("reference").subfolder(plan.fingerprint)
    files = []
    for part, number in parts_of(prepared).items():
        table = prepared.read_part(part, ["row_id", "prompt_ids", "chosen_ids", "rejected_ids"])
        logps = scorer.score(table.to_pylist())
        states = [(one.chosen, one.rejected) for one in scorer.hidden]
        write_scores(folder, part, table, logps, scorer.forwards, states)
        files.append({"file": part, "rows": number, **written(folder.read_bytes(part))})
    manifest = {"fingerprint": plan.fingerprint, "files": files, "inputs": plan.inputs}
    folder.write_json("manifest.json", manifest)
    scores = open_scores(folder, plan)
    assert scores is not None
    return scores


@pytest.fixture
def recipe(tiny_base: str, tmp_path: Path) -> Recipe:
    """`recipe(rows, **keys)`."""
    return lambda rows, **keys: recipe_of(tiny_base, tmp_path, rows, **keys)
