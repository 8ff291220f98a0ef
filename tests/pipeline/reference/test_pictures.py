"""Pictures are a part of what scores are found by, and models that don't take them are refused before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import RunConfig, parse_config
from pipeline.data.pictures import IMAGES, picture_column
from pipeline.data.store import Prepared
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from pipeline.reference import check_pictures
from pipeline.reference.actor import Job, ReferenceActor
from pipeline.reference.hashing import ids_digests, row_hashes
from pipeline.reference.plan import make_plan
from pipeline.reference.precision import Precision
from pipeline.reference.score_files import LOGPS, Task, read_scores
from strategies.inference.scoring import PairScorer
from strategies.vision.processing import VisionProcessing
from tests.picture_store import picture_store
from tests.suite.sharing import make_once
from tests.tiny_vision import llava, save_vision

PRECISION = Precision("float32", None, tf32=False)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        save_vision(folder / "base", "llava")

    return make_once(tmp_path_factory, "pictures", make)


@pytest.fixture
def store(tmp_path: Path) -> Prepared:
    return picture_store(tmp_path, llava(), train=5, evaluated=2)


def recipe(base: str | Path, **keys: Any) -> RunConfig:
    plain = {"datasets": [{"path": "-"}], "dataset_prepared_path": "-", "output_dir": "-", "sequence_len": 512, "bf16": False}
    return parse_config({"base_model": str(base), **plain, **keys})


def test_equal_ids_with_other_pictures_are_other_rows(store: Prepared) -> None:
    table = store.read("train")
    names = table[IMAGES].to_pylist()
    assert [len(one) for one in names] == [1, 1, 1, 0, 1]
    others = table.set_column(table.column_names.index(IMAGES), IMAGES, pa.array([*names[1:], []], pa.list_(pa.string())))
    hashes, other, text = (row_hashes(one).to_pylist() for one in (table, others, table.drop_columns([IMAGES])))
    assert [one == two for one, two in zip(hashes, other, strict=True)] == [
        names[0] == names[1],
        names[1] == names[2],
        *[False] * 3,
    ]
    # A row of text alone is the same row wherever it is.
    assert [one == two for one, two in zip(hashes, text, strict=True)] == [False, False, False, True, False]


def test_the_digest_of_a_part_has_its_pictures(store: Prepared, tmp_path: Path) -> None:
    table = store.read("train")
    digests = []
    for number, kept in enumerate((table, table.drop_columns([IMAGES]), table.slice(0, 4))):
        pq.write_table(kept, tmp_path / f"{number}.parquet")
        here = replace(store, folder=Folder(tmp_path), manifest={**store.manifest, "pictures": number != 1})
        digests += ids_digests(here, [f"{number}.parquet"])
    assert len(set(digests)) == 3 and digests[:1] == ids_digests(store, store.parts("train")[:1])


def test_the_processor_is_a_part_of_the_fingerprint(store: Prepared, root: Path) -> None:
    cfg = recipe(root / "base")
    settings = check_pictures(cfg, store)
    assert settings is not None and settings["size"] == {"shortest_edge": 32}
    plans = [
        make_plan(cfg, store, PRECISION, pictures=one) for one in (settings, {**settings, "size": {"shortest_edge": 48}}, None)
    ]
    assert len({plan.fingerprint for plan in plans}) == 3
    # Scores of text alone have the inputs that they always had.
    assert "pictures" not in plans[2].inputs
    assert check_pictures(cfg, replace(store, manifest={**store.manifest, "pictures": 0})) is None


def test_an_actor_scores_what_a_scorer_in_this_process_does(store: Prepared, root: Path, tmp_path: Path) -> None:
    budget = (700, "tokens_per_forward", PRECISION)
    job = Job(recipe(root / "base"), store, Folder(tmp_path), *budget, grown=False, use_gpu=False, threads=1, pictures=True)
    task = Task("train/part-00000.parquet", 1, 5)
    done = ReferenceActor(job).run(task)
    assert done["rows"] == 4 and done["padded_because"] is None
    vision = llava()
    rows = store.read("train").slice(1)
    column = picture_column(store.folder, rows[IMAGES])
    rows = rows.set_column(rows.column_names.index(IMAGES), IMAGES, column).to_pylist()
    expected = PairScorer(vision.model.eval(), 10_000, vision=VisionProcessing(vision.processor)).score(rows)
    scores = read_scores(Folder(tmp_path), task.staged)
    assert scores is not None
    for row, pair in zip(scores.to_pylist(), expected, strict=True):
        for name, values in zip(LOGPS, pair, strict=True):
            torch.testing.assert_close(torch.tensor(row[name]), torch.tensor(values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "prompt"}, "rl: dpo generates answers from text alone, and the rows have"),
        ({"base": "tiny"}, r"base_model: .* \(llama\) takes no pictures"),
        ({"token": 7}, r"base_model: LlavaProcessor writes the tokens .* for a picture, and .* looks for 7"),
        ({"reference": {"size": {"shortest_edge": 40}}}, r"reference_model: .* makes other pixels of a picture \(size: "),
        ({"reference": {}}, None),
    ],
)
def test_what_takes_no_pictures_is_refused(
    store: Prepared, tmp_path: Path, tiny_base: str, change: dict[str, Any], words: str | None
) -> None:
    base = tmp_path / "base"
    save_vision(base, "llava")
    keys: dict[str, Any] = {}
    if "kind" in change:
        store = replace(store, manifest={**store.manifest, **change})
    if "token" in change:
        config = json.loads((base / "config.json").read_text())
        config = {name: change["token"] if name in ("image_token_index", "image_token_id") else config[name] for name in config}
        (base / "config.json").write_text(json.dumps(config))
    if "reference" in change:
        other = tmp_path / "other"
        save_vision(other, "llava", seed=1)
        processor = json.loads((other / "processor_config.json").read_text())
        processor["image_processor"] |= change["reference"]
        (other / "processor_config.json").write_text(json.dumps(processor))
        keys["reference_model"] = str(other)
    cfg = recipe(tiny_base if "base" in change else base, **keys)
    if words is None:
        check_pictures(cfg, store)
        return
    with pytest.raises(UserError, match=words):
        check_pictures(cfg, store)
