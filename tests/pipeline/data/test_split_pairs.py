"""`split_pairs`: each pair becomes two labelled rows that stay together."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.data import Preview, load_transform
from pipeline.errors import UserError
from tests.pipeline.data.conftest import SHARED_DATA, make_config, prepare_here, write_jsonl
from tests.tiny import pairs


@pytest.fixture
def prepare_pairs(tmp_path, tokenizer):
    def make(rows, type=None, more=(), **changes):
        dataset = {"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "split_pairs": True}
        keys = {"rl": "kto", **changes}
        return prepare_here(make_config(tmp_path, {**dataset, "type": type}, *more, **keys), tokenizer, rows_per_part=4)

    return make


def halves(prepared, split="train"):
    return [
        (row["row_id"], row["row_number"], row["prompt"], row["completion"], row["label"])
        for row in prepared.read(split).to_pylist()
    ]


def test_the_halves_of_a_transform():
    split = load_transform("chatml.intel", rl="kto", split_pairs=True)
    row = {"question": "Q", "chosen": "C", "rejected": "R"}
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert [half.as_row() for half in split.rows(row)] == [
        {"prompt": prompt, "completion": "C<|im_end|>", "label": True},
        {"prompt": prompt, "completion": "R<|im_end|>", "label": False},
    ]
    assert split(row) == load_transform("chatml.intel")(row)


def test_types_are_those_of_pairs():
    assert load_transform("zephyr.nectar", rl="kto", split_pairs=True).name == "zephyr.nectar"
    message = "no dataset type 'chatml.nope' for rl: kto with split_pairs; .*There are: .*zephyr.nectar"
    with pytest.raises(UserError, match=message):
        load_transform("chatml.nope", rl="kto", split_pairs=True)


class TestPrepared:
    def test_chosen_first_and_two_places_for_each_pair(self, tmp_path, prepare_pairs):
        labelled = [{"prompt": "Q", "completion": "A", "label": False}] * 3
        other = {"path": str(write_jsonl(tmp_path / "b.jsonl", labelled))}
        rows = pairs(6)
        prepared = prepare_pairs(rows, more=[other])
        expected = []
        for place, row in enumerate(rows):
            expected.append((2 * place, place + 1, row["prompt"], row["chosen"], True))
            expected.append((2 * place + 1, place + 1, row["prompt"], row["rejected"], False))
        expected += [(12 + place, place + 1, "Q", "A", False) for place in range(3)]
        assert halves(prepared) == expected
        first = {"path": str(tmp_path / "a.jsonl"), "read": 6, "rejected": 0, "too_long": 0, "truncated": 0, "duplicates": 0}
        assert prepared.manifest["sources"][0] == {**first, "train": 12, "eval": 0}

    def test_a_bad_pair_is_one_rejected_row(self, prepare_pairs):
        bad = [{"prompt": "Q", "chosen": "C"}, {"prompt": "Q", "chosen": "C", "rejected": "C"}]
        prepared = prepare_pairs([*bad, *pairs(2)], max_rejected_fraction=0.5)
        assert prepared.read("rejected")["row_number"].to_pylist() == [1, 2]
        assert [row[0] for row in halves(prepared)] == [4, 5, 6, 7]

    def test_of_a_long_pair_the_short_half_stays(self, prepare_pairs):
        rows = [{"prompt": "12345", "chosen": "a" * 60, "rejected": "R"}, {"prompt": "6", "chosen": "C", "rejected": "b" * 60}]
        prepared = prepare_pairs(rows, sequence_len=20)
        assert halves(prepared) == [(1, 1, "12345", "R", False), (2, 2, "6", "C", True)]
        assert prepared.manifest["sources"][0]["too_long"] == 2

    def test_halves_that_are_the_same_after_the_cut_go(self, prepare_pairs):
        rows = [
            {"prompt": "12345", "chosen": "abcdX", "rejected": "abcdY"},
            {"prompt": "12345", "chosen": "abX", "rejected": "b"},
        ]
        prepared = prepare_pairs(rows, sequence_len=8, excess_length_strategy="truncate")
        assert [row[:2] for row in halves(prepared)] == [(2, 2), (3, 2)]
        assert (prepared.manifest["sources"][0]["too_long"], prepared.manifest["sources"][0]["truncated"]) == (2, 1)

    def test_duplicates_are_found_by_half(self, prepare_pairs):
        rows = [{"prompt": "Q", "chosen": "C", "rejected": text} for text in ("R", "S", "R")]
        prepared = prepare_pairs(rows, dataset_exact_deduplication=True)
        assert halves(prepared) == [(0, 1, "Q", "C", True), (1, 1, "Q", "R", False), (3, 2, "Q", "S", False)]
        assert prepared.manifest["sources"][0]["duplicates"] == 3

    @pytest.mark.parametrize(("val", "eval_rows"), [(1, 2), (5, 6), (6, 6), (0.3, 12)])
    def test_both_halves_land_on_the_same_side(self, prepare_pairs, val, eval_rows):
        prepared = prepare_pairs(pairs(20), val_set_size=val)
        sides = [{row[1] for row in halves(prepared, split)} for split in ("train", "eval")]
        assert not sides[0] & sides[1]
        assert (prepared.eval_rows, prepared.train_rows) == (eval_rows, 40 - eval_rows)

    def test_the_preview_shows_the_halves(self, prepare_pairs, tokenizer):
        out = io.StringIO()
        Console(file=out, width=200, no_color=True).print(Preview(prepare_pairs(pairs(3)), tokenizer, examples=2))
        assert "completion 8 tokens, label true" in out.getvalue()
        assert "completion 8 tokens, label false" in out.getvalue()

    @pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
    def test_real_pairs(self, tmp_path, tokenizer):
        dataset = {
            "path": str(SHARED_DATA / "dpo_en_demo.json"),
            "type": "chat_template.default",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
            "split_pairs": True,
            "split": "train[:150]",
        }
        cfg = make_config(tmp_path, dataset, rl="kto", sequence_len=10**6, val_set_size=0.1)
        prepared = prepare_here(cfg, tokenizer)
        assert prepared.train_rows + prepared.eval_rows == 2 * (150 - prepared.rejected_rows)
        raw = json.loads((SHARED_DATA / "dpo_en_demo.json").read_text())
        rows = prepared.read().to_pylist()
        assert {row["row_id"] % 2 == 0 for row in rows if row["label"]} == {True}
        for row in rows[::37]:
            given = raw[row["row_id"] // 2]["chosen" if row["label"] else "rejected"]["value"]
            assert tokenizer.decode(row["completion_ids"]) == given + "<|im_end|>"
        assert not {row["row_number"] for row in rows} & set(prepared.read("eval")["row_number"].to_pylist())
