"""What rules look at is the same wherever a run's data lie."""

from __future__ import annotations

import json

import pyarrow as pa

from pipeline.findings.facts import LOGPS, ReferenceGap, RowCounts, read_facts
from pipeline.io.storage import Folder
from pipeline.runs.folder import RunFolder
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny import pairs, tiny_tokenizer


def test_rows_and_scores_in_a_bucket_are_looked_at(tmp_path, s3):
    rows = write_jsonl(tmp_path / "rows.jsonl", pairs(10))
    for root in (str(tmp_path / "prepared"), s3.uri("prepared")):
        cfg = make_config(tmp_path, {"path": str(rows)}, val_set_size=2, dataset_prepared_path=root)
        prepared = prepare_here(cfg, tiny_tokenizer(), rows_per_part=4)
        logps = pa.table([[[-1.0, -2.0], [-1.0]] * 4, [[-3.0], [-0.5]] * 4], list(LOGPS))
        scores = Folder(root).subfolder("reference/scores")
        scores.write_table("train/part-00000.parquet", logps)
        scores.write("manifest.json", json.dumps({"files": [{"file": "train/part-00000.parquet"}]}))

        state = {"prepared": prepared.fingerprint, "scores": "scores"}
        facts = read_facts(RunFolder(tmp_path / "run"), cfg, state, [])

        assert facts.rows == RowCounts(train=8, evaluation=2, looked_at=8, prompts=8), root
        assert facts.gap == ReferenceGap(pairs=8, right=4, gap=0.5), root
