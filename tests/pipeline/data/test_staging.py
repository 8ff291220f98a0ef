"""One task's work, without Ray: parts, rejected rows, resuming."""

from __future__ import annotations

import errno

import pyarrow.parquet as pq
import pytest

from pipeline.data import process_shard as staging
from pipeline.data.job import Job
from pipeline.data.process_shard import stage_shard
from pipeline.data.sources.shards import survey
from pipeline.data.tokenize import tokenise
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from strategies.plugins import Plugins
from tests.pipeline.data.conftest import write_jsonl
from tests.tiny import pairs


@pytest.fixture
def make_job(tmp_path, tokenizer):
    def make(rows, rows_per_part=4, name="a.jsonl", rl="dpo", keys=None, **changes):
        dataset = {"path": str(write_jsonl(tmp_path / name, rows)), **(keys or {})}
        shards = survey(dataset, 0, rows_per_part).shards
        settings = {"sequence_len": 2048, "excess_length_strategy": "drop", **changes}
        return Job(
            rl,
            tokenizer,
            (dataset,),
            (None,),
            shards,
            rows_per_part=rows_per_part,
            store=Folder(tmp_path),
            plugins=Plugins(),
            **settings,
        )

    return make


def stage(job):
    return [summary for shard in job.shards for summary in stage_shard(job, shard)]


def test_parts_hold_rows_in_order(make_job, tokenizer):
    job = make_job(pairs(10))
    parts = stage(job)
    assert [(part["read"], part["rows"], part["end"]) for part in parts] == [(4, 4, 4), (4, 4, 8), (2, 2, 10)]
    table = pq.read_table(job.staging.where / parts[1]["part"])
    assert table["row_number"].to_pylist() == [5, 6, 7, 8]
    assert table["prompt"].to_pylist() == [row["prompt"] for row in pairs(10)[4:8]]
    row = table.to_pylist()[0]
    assert tokenizer.decode(row["chosen_ids"]) == row["chosen"] + "<|im_end|>"
    assert row["chosen_length"] == len(row["chosen_ids"])


def test_rejected_rows_keep_their_place_and_reason(make_job):
    job = make_job([*pairs(2), {"prompt": "Q", "chosen": "C"}, {"prompt": "", "chosen": "C", "rejected": "R"}])
    (part,) = stage(job)
    assert (part["read"], part["rows"], part["rejected"]) == (4, 2, 2)
    rows = pq.read_table((job.staging.where / part["part"]).with_suffix(".rejected")).to_pylist()
    assert [(row["row_number"], row["reason"]) for row in rows] == [
        (3, "no column 'rejected' (the row has prompt, chosen)"),
        (4, "'prompt' is empty"),
    ]
    assert rows[0]["raw"] == '{"prompt": "Q", "chosen": "C"}'
    assert rows[0]["source"].endswith("a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_parts_that_are_there_are_left_alone(make_job, name):
    job = make_job(pairs(10), name=name)
    first = stage(job)
    paths = [job.staging.where / part["part"] for part in first]
    paths[1].unlink()
    times = [path.stat().st_mtime_ns for path in (paths[0], paths[2])]
    assert stage(job) == first
    assert [path.stat().st_mtime_ns for path in (paths[0], paths[2])] == times
    assert paths[1].exists()


def test_long_rows(make_job):
    rows = [{"prompt": "12345", "chosen": "abc", "rejected": "d"}, {"prompt": "12345", "chosen": "ab", "rejected": "d"}]
    (part,) = stage(make_job(rows, sequence_len=8))
    assert (part["too_long"], part["rows"], part["truncated"]) == (1, 1, 0)


def test_megabytes_are_dropped_unseen(make_job, monkeypatch):
    seen = []
    monkeypatch.setattr(staging, "tokenise", lambda texts, tokenizer: seen.extend(texts) or tokenise(texts, tokenizer))
    row = {"prompt": "a " * 3_000_000, "chosen": "b", "rejected": "c"}
    (part,) = stage(make_job([*pairs(2), row], sequence_len=64))
    assert (part["rows"], part["too_long"], len(seen)) == (2, 1, 2)


def test_long_rows_truncated(make_job):
    rows = [{"prompt": "12345", "chosen": "abc", "rejected": "d"}, {"prompt": "12345678", "chosen": "ab", "rejected": "d"}]
    job = make_job(rows, sequence_len=8, excess_length_strategy="truncate")
    (part,) = stage(job)
    assert (part["too_long"], part["rows"], part["truncated"]) == (1, 1, 1)
    assert pq.read_table(job.staging.where / part["part"])["chosen_length"].to_pylist() == [3]


def test_megabytes_are_cut_before_tokens_are_counted(make_job, monkeypatch, tokenizer):
    seen = []
    monkeypatch.setattr(staging, "tokenise", lambda texts, tokenizer: seen.extend(texts) or tokenise(texts, tokenizer))
    rows = [
        {"prompt": "12345", "chosen": "a " * 3_000_000, "rejected": "d"},
        {"prompt": "12345", "chosen": "a " * 3_000_000, "rejected": "a " * 3_000_000 + "b"},
        {"prompt": "a " * 3_000_000, "chosen": "b", "rejected": "c"},
    ]
    job = make_job(rows, sequence_len=64, excess_length_strategy="truncate")
    (part,) = stage(job)
    assert (part["rows"], part["too_long"], part["truncated"], part["rejected"]) == (1, 2, 1, 0)
    assert [max(map(len, text.sequences)) < 10_000 for text in seen] == [True]
    chosen = pq.read_table(job.staging.where / part["part"])["chosen_ids"].to_pylist()[0]
    assert tokenizer.decode(chosen) == ("a " * 64)[: 64 - len("12345")]


def test_long_rows_raise(make_job):
    rows = [*pairs(2), {"prompt": "12345", "chosen": "a" * 60, "rejected": "d"}]
    message = (
        r"excess_length_strategy: raise, and row 3 of .*a.jsonl has 66 tokens, more than sequence_len 50; raise sequence_len"
    )
    with pytest.raises(UserError, match=message):
        stage(make_job(rows, sequence_len=50, excess_length_strategy="raise"))


def test_a_full_disk_leaves_what_was_complete(make_job, monkeypatch):
    job, real, calls = make_job(pairs(10)), pq.write_table, []

    def write_table(table, file, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, file, **kwargs)

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(OSError, match="No space left"):
        stage(job)
    assert len(list(job.staging.where.iterdir())) == 1
    assert len(stage(job)) == 3
    assert len(calls) == 4


TALK = {
    "prompt": [{"role": "user", "content": "What does <|im_end|> mean?"}],
    "chosen": [{"role": "assistant", "content": "<|im_end|> ends a turn that <|im_start|> has begun."}],
    "rejected": [{"role": "assistant", "content": "No idea."}],
}


class TestControlTokensAsText:
    def staged(self, make_job, row, **changes):
        job = make_job([row], **changes)
        (part,) = stage(job)
        return part, pq.read_table(job.staging.where / part["part"]).to_pylist()

    def test_they_are_text_and_the_templates_stay(self, make_job, tokenizer):
        part, (row,) = self.staged(make_job, TALK, encode_special_tokens=False)
        start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        assert part["notes"] == []
        assert row["prompt"].startswith("<|im_start|>user\nWhat does <|im_end|> mean?<|im_end|>\n")
        assert [row["prompt_ids"].count(token) for token in (start, end)] == [2, 1]
        assert [row["chosen_ids"].count(token) for token in (start, end)] == [0, 1]
        for name in ("prompt", "chosen", "rejected"):
            assert tokenizer.decode(row[f"{name}_ids"]) == row[name]

    def test_else_they_are_noted(self, make_job):
        part, _ = self.staged(make_job, TALK)
        assert {(note["kind"], note["detail"]) for note in part["notes"]} == {
            ("control_tokens", "<|im_end|>"),
            ("control_tokens", "<|im_start|>"),
        }

    def test_rows_without_any_stay_as_they_are(self, make_job):
        (row,) = pairs(1)
        _, with_it = self.staged(make_job, row, encode_special_tokens=False, name="b.jsonl")
        _, without = self.staged(make_job, row, name="c.jsonl")
        assert with_it == without

    def test_plain_text(self, make_job, tokenizer):
        row = {"prompt": "Write the end: ", "chosen": "it is <|im_end|>", "rejected": "no"}
        _, (row,) = self.staged(make_job, row, encode_special_tokens=False)
        assert row["chosen"] == "it is <|im_end|>"
        assert tokenizer.decode(row["chosen_ids"]) == "it is <|im_end|><|im_end|>"
        assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1

    def test_a_tokenizer_that_cannot(self, make_job, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "decode", lambda ids: "?")
        with pytest.raises(UserError, match="encode_special_tokens: this tokenizer can't read '<|im_end|>' as text"):
            self.staged(make_job, TALK, encode_special_tokens=False)
