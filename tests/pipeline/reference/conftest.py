"""A recipe whose scores take a second, and the same reference computed the plain way."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig, parse_config
from pipeline.data import Prepared, prepare
from pipeline.reference import Scores, score
from tests.suite.sharing import make_once
from tests.tiny import pairs

FILES = (25, 25, 10)
"""Raw rows of each data file, whose training rows are a part, and so are its evaluation rows."""
FILE_NAMES = tuple(f"pairs-{number}.jsonl" for number in range(len(FILES)))
ROWS_PER_TASK = 10
"""A part takes up to three tasks, and a task several forwards."""

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def scored_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data lie that all tests here share; what changes them copies them."""
    return make_once(tmp_path_factory, "scored", write_data)


def write_data(root: Path) -> None:
    rows = pairs(sum(FILES))
    for file, number in zip(FILE_NAMES, FILES, strict=True):
        own, rows = rows[:number], rows[number:]
        (root / file).write_text("".join(json.dumps(pair) + "\n" for pair in own))


@pytest.fixture(scope="session")
def recipe(tiny_base: str, scored_root: Path) -> Recipe:
    """`recipe(**keys)`: 52 training pairs and 8 for evaluation, a few pairs per forward."""

    def make(**keys: Any) -> RunConfig:
        defaults = {
            "base_model": tiny_base,
            "datasets": [{"path": str(scored_root / file)} for file in FILE_NAMES],
            "val_set_size": 8,
            "dataset_prepared_path": str(scored_root / "prepared"),
            "sequence_len": 256,
            "tokens_per_forward": 160,
            "output_dir": str(scored_root / "run"),
        }
        return parse_config({**defaults, **keys})

    return make


@pytest.fixture(scope="session")
def prepared(ray_session: Any, recipe: Recipe) -> Prepared:
    return prepare(recipe())


@pytest.fixture(scope="session")
def scores(recipe: Recipe, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """An undisturbed run, as the process of tests got it that ran it."""

    def make(folder: Path) -> None:
        (folder / "scores").write_bytes(pickle.dumps(score(recipe(), prepared, rows_per_task=ROWS_PER_TASK)))

    return pickle.loads((make_once(tmp_path_factory, "scores", make) / "scores").read_bytes())


@pytest.fixture
def copied(scores: Scores, recipe: Recipe, prepared: Prepared, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A recipe over copies of the data and of the scores, to be damaged, and the copied scores' folder."""
    root = Path(shutil.copytree(prepared.path.parent, tmp_path / "prepared"))
    return recipe(dataset_prepared_path=str(root)), root / "reference" / scores.fingerprint


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probability of each completion token, from the logits of the sequence alone."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return logps.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1).tolist()
