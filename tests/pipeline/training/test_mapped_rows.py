"""Workers map rows and scores from files of the node's cache: the same rows as in the store, held once by all of them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from pipeline.data import Prepared
from pipeline.data.mapped import StoredColumns, map_columns, open_mapped
from pipeline.data.pictures import IMAGES, picture_column
from pipeline.data.store import open_store
from pipeline.errors import UserError
from pipeline.io.cache import NodeCache
from pipeline.io.digests import as_written
from pipeline.io.storage import Folder
from pipeline.reference import Scores
from pipeline.reference.score_files import LOGPS, write_scores
from pipeline.training.mapped_rows import check_room, map_rows
from strategies.batch.loader import pair_lengths
from strategies.dataset_rows import ID_COLUMNS, ROW_ID
from tests.laws.runs import losses, trained
from tests.picture_store import picture_store
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.s3 import Bucket
from tests.tiny import labelled, pairs, tiny_tokenizer
from tests.tiny_vision import llava

ROOT = Path(__file__).parents[3]
RAW: dict[str, Any] = {
    "dpo": pairs(40),
    "kto": labelled(40),
    "grpo": [{"prompt": f"What is {row} plus {row % 5}? ", "answer": str(row + row % 5)} for row in range(40)],
}
SHARES = """
import re, sys
from pathlib import Path
import pyarrow.compute as pc
from pipeline.data.mapped import open_mapped

def anonymous():
    return int(re.search(r"Pss_Anon: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1]) / 1000

before = anonymous()
table = open_mapped(Path(sys.argv[1]))
total = sum(pc.sum(pc.list_flatten(table[name])).as_py() for name in table.column_names)
print(total, flush=True)
sys.stdin.readline()  # the other one has read them too
text = Path("/proc/self/smaps").read_text()
mapping = text[text.index(sys.argv[1]):]
value = lambda name: int(re.search(rf"^{name}: +(\\d+) kB", mapping, re.MULTILINE)[1]) / 1000
print(value("Rss"), value("Pss"), value("Private_Clean") + value("Private_Dirty"), anonymous() - before, flush=True)
sys.stdin.readline()
"""


def prepared_rows(folder: Path, rl: str = "dpo") -> Prepared:
    """A store of three parts with rows to train on, and some to evaluate on."""
    cfg = make_config(folder, {"path": str(write_jsonl(folder / "rows.jsonl", RAW[rl]))}, rl=rl, val_set_size=8)
    return prepare_here(cfg, tiny_tokenizer(), rows_per_part=16)


def scores_of(folder: Path, prepared: Prepared) -> Scores:
    """Made-up scores of a store, row for row."""
    files = []
    for entry in prepared.manifest["files"]:
        table = pq.read_table(prepared.path / entry["file"], partitioning=None)
        lengths = zip(table["chosen_length"].to_pylist(), table["rejected_length"].to_pylist(), strict=True)
        logps = [tuple(-np.arange(1, tokens + 1, dtype=np.float32) / 7 for tokens in both) for both in lengths]
        write_scores(Folder(folder), entry["file"], table, logps, 1)
        files.append({"file": entry["file"], "rows": len(table), **as_written(folder / entry["file"])})
    return Scores(folder, "scores", prepared.train_rows, prepared.eval_rows, {"files": files}, Folder(folder))


@pytest.mark.parametrize("rl", list(RAW))
def test_law_mapped_rows_are_the_rows_of_the_store(tmp_path: Path, rl: str) -> None:
    prepared, cache = prepared_rows(tmp_path, rl), NodeCache(tmp_path / "cache")
    scores = scores_of(tmp_path / "scores", prepared) if rl == "dpo" else None
    columns = [*ID_COLUMNS[{"dpo": "pair", "kto": "unpaired", "grpo": "prompt"}[rl]], ROW_ID]
    for split in ("train", "eval"):
        read = prepared.read(split, columns)
        for name in LOGPS if scores is not None else ():
            read = read.append_column(name, scores.read(split)[name])
        mapped = map_rows(cache, prepared, scores, split, columns)
        assert mapped.to_list() == Dataset(read).to_list() and len(mapped) == prepared.rows(split)
        assert len(mapped.data.column(0).chunks) > 1 or split == "eval"
        # What a data-loader process gets that isn't forked: names of files.
        sent = pickle.dumps(mapped)
        assert str(cache.root).encode() in sent and pickle.loads(sent).to_list() == mapped.to_list()
    assert len(sent) < 10_000


def test_law_a_run_of_mapped_rows_is_that_of_rows_in_memory(tmp_path: Path) -> None:
    prepared = prepared_rows(tmp_path)
    scores, columns = scores_of(tmp_path / "scores", prepared), [*ID_COLUMNS["pair"], ROW_ID]
    mapped = map_rows(NodeCache(tmp_path / "cache"), prepared, scores, "train", columns)
    read = Dataset(pa.table({**_columns(prepared.read("train", columns)), **_columns(scores.read("train"))}))
    assert (pair_lengths(mapped) == pair_lengths(read)).all()
    one, other = (trained(tmp_path / name, rows=rows) for name, rows in (("mapped", mapped), ("read", read)))
    assert losses(one) == losses(other) and len(losses(one)) > 2


def _columns(table: pa.Table) -> dict[str, Any]:
    return dict(zip(table.column_names, table.columns, strict=True))


def test_law_mapped_pictures_are_those_of_the_store(tmp_path: Path) -> None:
    prepared = picture_store(tmp_path, llava())
    columns = [*ID_COLUMNS["pair"], ROW_ID, IMAGES]
    read = prepared.read("train", columns)
    read = read.set_column(columns.index(IMAGES), IMAGES, picture_column(prepared.folder, read[IMAGES]))
    mapped = map_rows(NodeCache(tmp_path / "cache"), prepared, None, "train", columns)
    assert mapped.to_list() == Dataset(read).to_list()
    assert all(Path(picture["path"]).exists() for row in mapped for picture in row[IMAGES])


@pytest.mark.parametrize(
    ("rl", "rows", "kind", "keys"),
    [
        ("orpo", pairs(20), "pair", {}),
        ("kto", labelled(20), "unpaired", {}),
        ("kto", pairs(20), "unpaired", {"split_pairs": True}),
        ("grpo", RAW["grpo"][:20], "prompt", {}),
    ],
)
def test_rows_of_every_kind_come_from_a_bucket(
    tmp_path: Path, s3: Bucket, rl: str, rows: list[Any], kind: str, keys: dict[str, Any]
) -> None:
    data = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), **keys}
    roots = (str(tmp_path / "prepared"), s3.uri("prepared"))
    cfgs = [make_config(tmp_path, data, rl=rl, val_set_size=4, dataset_prepared_path=root) for root in roots]
    local, there = (prepare_here(cfg, tiny_tokenizer(), rows_per_part=8) for cfg in cfgs)
    assert there.manifest == local.manifest and there.train_rows >= 16
    columns = [*ID_COLUMNS[kind], ROW_ID]
    mapped = map_rows(NodeCache(tmp_path / "cache"), pickle.loads(pickle.dumps(there)), None, "train", columns)
    assert mapped.to_list() == Dataset(local.read("train", columns)).to_list()


def test_what_is_deleted_during_a_run(tmp_path: Path, s3: Bucket) -> None:
    """Mapped rows stay; a worker that comes later brings them again, or says what is missing."""
    data = {"path": str(write_jsonl(tmp_path / "rows.jsonl", pairs(20)))}
    prepared = prepare_here(make_config(tmp_path, data, dataset_prepared_path=s3.uri("prepared")), tiny_tokenizer())
    columns = [*ID_COLUMNS["pair"], ROW_ID]
    cache = NodeCache(tmp_path / "cache")
    first = map_rows(cache, prepared, None, "train", columns)
    rows = first.to_list()
    shutil.rmtree(cache.root)
    assert first.to_list() == rows
    assert map_rows(cache, prepared, None, "train", columns).to_list() == rows
    s3.empty()
    assert first.to_list() == rows
    # The node still has them.
    assert map_rows(cache, prepared, None, "train", columns).to_list() == rows
    with pytest.raises(UserError, match=r"^dataset_prepared_path: .* doesn't hold the training rows .*: is missing"):
        map_rows(NodeCache(tmp_path / "other"), prepared, None, "train", columns)


def test_a_store_in_a_bucket_comes_to_the_node_with_its_pictures(tmp_path: Path, s3: Bucket) -> None:
    local, there = picture_store(tmp_path, llava()), Folder(s3.uri("prepared"))
    for file in local.folder.files():
        there.write_bytes(f"{local.fingerprint}/{file}", local.folder.read_bytes(file))
    prepared = open_store(there.subfolder(local.fingerprint))
    assert prepared is not None
    columns, cache = [*ID_COLUMNS["pair"], ROW_ID, IMAGES], NodeCache(tmp_path / "cache")
    # As workers get it, with keys of their own.
    mapped = map_rows(cache, pickle.loads(pickle.dumps(prepared)), None, "train", columns)
    shown = [[Path(picture["path"]) for picture in row[IMAGES]] for row in mapped]
    of_store = map_rows(NodeCache(tmp_path / "local"), local, None, "train", columns)
    assert mapped.remove_columns(IMAGES).to_list() == of_store.remove_columns(IMAGES).to_list()
    assert all(path.is_relative_to(cache.root) for row in shown for path in row) and any(shown)
    read = [[Path(picture["path"]).read_bytes() for picture in row[IMAGES]] for row in of_store]
    assert [[path.read_bytes() for path in row] for row in shown] == read
    picture = next(file for file in local.folder.files("images/"))
    there.write_bytes(f"{local.fingerprint}/{picture}", b"another writer's")
    with pytest.raises(UserError, match=f"dataset_prepared_path: .*the pictures of the rows as they were written: .*{picture}"):
        map_rows(NodeCache(tmp_path / "other"), prepared, None, "train", columns)


def test_a_cache_that_is_too_small_is_said_once_with_the_size_of_all(tmp_path: Path) -> None:
    prepared, columns = prepared_rows(tmp_path), [*ID_COLUMNS["pair"], ROW_ID]
    scores, cache = scores_of(tmp_path / "scores", prepared), NodeCache(tmp_path / "cache")
    check_room(cache, prepared, scores, columns)
    for split in ("train", "eval"):
        map_rows(cache, prepared, scores, split, columns)
    needed = sum(file.stat().st_size for file in cache.root.glob("*/*.arrow"))
    check_room(NodeCache(cache.root, 1), prepared, scores, columns)
    small = NodeCache(tmp_path / "small", needed // 2)
    what = "the training rows, the scores of the training rows, the evaluation rows, the scores of the evaluation rows"
    with pytest.raises(UserError, match=f"^ray.cache_size: {what} take about .*; set 0.[1-9]MB or more$"):
        check_room(small, prepared, scores, columns)


def test_a_second_run_finds_the_rows_there(tmp_path: Path) -> None:
    prepared, cache = prepared_rows(tmp_path), NodeCache(tmp_path / "cache")
    columns = StoredColumns.of(prepared, "train", [*ID_COLUMNS["pair"], ROW_ID], "the training rows")
    rows = open_mapped(map_columns(cache, columns))
    shutil.rmtree(tmp_path / "prepared")
    assert open_mapped(map_columns(cache, columns)).equals(rows)


@pytest.mark.parametrize("harm", ["cut", "changed", "missing"])
def test_a_part_that_is_not_what_was_written(tmp_path: Path, harm: str) -> None:
    prepared, cache = prepared_rows(tmp_path), NodeCache(tmp_path / "cache")
    file = prepared.train_files()[-1]
    if harm == "cut":
        os.truncate(file, 100)
    elif harm == "changed":
        shutil.copy(prepared.train_files()[0], file)
    else:
        file.unlink()
    problem = {"cut": "has 100 bytes", "changed": "has|was changed", "missing": "is missing"}[harm]
    with pytest.raises(UserError, match=f"dataset_prepared_path: .*the training rows as .*{file.name}: ({problem})"):
        map_rows(cache, prepared, None, "train", list(ID_COLUMNS["pair"]))
    assert not [entry for entry in cache.root.iterdir() if entry.is_dir()]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts pages as Linux does")
def test_two_processes_of_a_node_hold_the_rows_once(tmp_path: Path) -> None:
    rng, files = np.random.default_rng(0), []
    for part in range(4):
        lists = pa.ListArray.from_arrays(np.arange(0, 2_000_001, 1000, dtype=np.int32), rng.integers(0, 9, 2_000_000, np.int32))
        name = f"train/part-{part:05d}.parquet"
        files.append({"file": name, "rows": 2000, **Folder(tmp_path).write_table(name, pa.table({"prompt_ids": lists}))})
    columns = StoredColumns(Folder(tmp_path), tuple(files), ("prompt_ids",), "the training rows")
    file = map_columns(NodeCache(tmp_path / "cache"), columns)
    megabytes = file.stat().st_size / 2**20
    assert megabytes > 30
    words = [sys.executable, "-c", SHARES, str(file)]
    ranks = [subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert len({_say(rank) for rank in ranks}) == 1  # both have read all
        for rank in ranks:
            _ask(rank)
        for rank in ranks:
            resident, proportional, private, anonymous = map(float, _say(rank).split())
            assert resident > 0.95 * megabytes
            assert proportional < 0.55 * megabytes and private < 0.05 * megabytes
            assert anonymous < 10
            _ask(rank)
    finally:
        for rank in ranks:
            rank.communicate()


def _say(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _ask(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
