"""Prompts alone: what the trainer is handed, of every dataset type."""

from __future__ import annotations

import datetime
import io
import json

import pytest
from rich.console import Console

from pipeline.data import Preview, dataset_types, load_transform
from pipeline.data.transforms import RowError
from pipeline.errors import UserError
from tests.pipeline.data.conftest import SHARED_DATA, make_config, prepare_here, write_jsonl
from tests.pipeline.data.test_turns import COMPLETION_ROWS, OPEN, PAIR_ROWS, USER, chat

QUESTION = {"role": "user", "content": "Q"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CHATML = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def transform(tokenizer):
    def make(type=None, **keys):
        return load_transform(type, rl="grpo", tokenizer=tokenizer, **keys)

    return make


def said(text):
    return {"role": "assistant", "content": text}


def test_the_types_are_those_of_pairs():
    assert dataset_types("prompt") == dataset_types("pair")


@pytest.mark.parametrize(
    ("dataset", "row"),
    [
        ({"type": "chat_template.default"}, {"messages": [{**QUESTION, "content": "Is <|im_end|> it?"}]}),
        ({}, {"prompt": [{**QUESTION, "content": "Is <|im_end|> it?"}]}),
    ],
)
def test_control_tokens_are_noted(tokenizer, dataset, row):
    from pipeline.data.transforms import build_transform
    from pipeline.data.transforms.base import Context

    (rendered,) = build_transform("grpo", Context(tokenizer, None, dataset)).rows(row)
    assert {(note.kind, note.detail) for note in rendered.notes} == {("control_tokens", "<|im_end|>")}


def test_pictures_are_refused(transform):
    with pytest.raises(RowError, match="the column 'images' is no text"):
        transform()({"prompt": "What is it?", "images": ["a.png"]})


@pytest.mark.parametrize("rows", [PAIR_ROWS, COMPLETION_ROWS])
@pytest.mark.parametrize("turns", ["chatml", "llama3"])
def test_turns_need_no_answers(turns, rows):
    for shape, row in rows.items():
        if shape == "argilla_chat":
            row = PAIR_ROWS[shape]
        prompt = USER[turns].format("Q") + OPEN[turns]
        handed = {**row, "prompt": prompt}
        assert load_transform(f"{turns}.{shape}", rl="grpo")(row) == {"prompt": prompt, "row": handed}


def test_later_turns_of_ultra():
    row = {"prompt": "1", "chosen": chat("1", "2", "3", "C"), "rejected": chat("1", "2", "3", "R")}
    assert load_transform("chatml.ultra", rl="grpo")(row)["prompt"] == load_transform("chatml.ultra")(row)["prompt"]


def test_nectar_and_a_mapping():
    prompt = "<|system|>\n</s>\n<|user|>\nQ</s>\n<|assistant|>\n"
    assert load_transform("zephyr.nectar", rl="grpo")({"prompt": "Q"})["prompt"] == prompt
    given = {"field_prompt": "ask", "field_system": "sys", "prompt_format": "[{system}] {prompt}"}
    made = load_transform(given, rl="grpo")({"ask": "Q", "sys": "S", "answer": 4})
    assert made == {"prompt": "[S] Q", "row": {"prompt": "[S] Q", "ask": "Q", "sys": "S", "answer": 4}}
    with pytest.raises(UserError, match="type.field_chosen: unknown key; .*Allowed: field_prompt, field_system, prompt_format"):
        load_transform({"field_chosen": "good"}, rl="grpo")


def test_chat_templates_make_text(transform):
    row = {"messages": [QUESTION], "answer": "4"}
    assert transform("chat_template.default")(row) == {"prompt": CHATML, "row": {"prompt": CHATML, **row}}
    row = {"chosen": [QUESTION, said("C")], "rejected": [QUESTION, said("R")]}
    for type in ("chat_template.argilla_chat", "chat_template.argilla"):
        assert transform(type)(row) == {"prompt": CHATML, "row": {"prompt": CHATML, **row}}


def test_messages_stay_messages(transform):
    row = {"prompt": [QUESTION], "answer": "4"}
    assert transform()(row) == {"prompt": CHATML, "row": row}
    assert transform()({"prompt": json.dumps([QUESTION])})["row"] == {"prompt": [QUESTION]}


def test_text_stays_text(transform):
    row = {"prompt": "Q", "level": 3, "tools": TOOLS}
    assert transform()(row) == {"prompt": "Q", "row": row}


def test_the_prompt_of_a_pair(transform):
    """`chosen` and `rejected` stay for the reward functions; a prompt that they share is theirs to give."""
    row = {"prompt": "Q", "chosen": "C", "rejected": "R"}
    assert transform()(row)["row"] == row
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert transform()(row)["row"] == {"prompt": "The sky is", **row}
    row = {"prompt": "Q", "chosen": [QUESTION, said("C")], "rejected": [QUESTION, said("R")]}
    assert transform()(row)["row"] == {**row, "prompt": [QUESTION]}


def test_columns_that_json_cannot_hold_are_left_out(transform):
    row = {"prompt": "Q", "when": datetime.date(2024, 1, 1), "checksum": b"x", "level": 3.5, "tags": ["a", None]}
    assert transform()(row)["row"] == {"prompt": "Q", "level": 3.5, "tags": ["a", None]}


def test_bos_is_left_to_the_trainer(bos_tokenizer, tokenizer):
    """TRL gives a text that begins with BOS another one."""
    made = load_transform(None, rl="grpo", tokenizer=bos_tokenizer)({"prompt": "<s>Q"})
    assert made == {"prompt": "Q", "row": {"prompt": "Q"}}
    assert load_transform(None, rl="grpo", tokenizer=tokenizer)({"prompt": "<s>Q"})["prompt"] == "<s>Q"


@pytest.mark.parametrize(
    ("type", "row", "reason"),
    [
        (None, {"answer": 4}, r"no column 'prompt' \(the row has answer\)"),
        (None, {"prompt": " "}, "'prompt' is empty"),
        (None, {"prompt": 3}, "'prompt' must be text, got int"),
        (None, {"prompt": [QUESTION, said("A")]}, "the prompt ends in a turn of the assistant; it must end where the model is"),
        ("chat_template.default", {"messages": [QUESTION, said("A")]}, "the prompt ends in a turn of the assistant"),
        ("chat_template.default", {"messages": []}, "the prompt is empty"),
        (
            None,
            {"prompt": [QUESTION], "tools": TOOLS},
            "grpo renders messages without the row's 'tools'; type: chat_template.d",
        ),
        (None, {"prompt": [QUESTION], "chat_template_kwargs": {"a": 1}}, "without the row's 'chat_template_kwargs'"),
        ("chat_template.default", {"messages": [QUESTION], "tools": TOOLS}, "the chat template does not render tools"),
        ("chatml.intel", {"prompt": "Q"}, "no column 'question'"),
        ("chatml.argilla_chat", {"chosen": chat("1", "C"), "rejected": chat("2", "R")}, "answer different prompts"),
    ],
)
def test_bad_rows(transform, type, row, reason):
    with pytest.raises(RowError, match=reason):
        transform(type)(row)


def test_tools_are_rendered_where_the_template_can(transform):
    from tests.pipeline.data.test_chat import QWEN3

    made = transform("chat_template.default", chat_template_jinja=QWEN3)({"messages": [QUESTION], "tools": TOOLS})
    assert '"name": "weather"' in made["prompt"]
    assert made["row"]["tools"] == TOOLS


class TestPrepared:
    @pytest.fixture
    def prepare_rows(self, tmp_path, tokenizer):
        def make(rows, *more, type=None, **changes):
            dataset = {"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "type": type}
            return prepare_here(make_config(tmp_path, dataset, *more, rl="grpo", **changes), tokenizer, rows_per_part=4)

        return make

    def test_columns(self, tokenizer, prepare_rows):
        rows = [{"prompt": [{"role": "user", "content": f"Q{n} é"}], "answer": n} for n in range(10)]
        prepared = prepare_rows(rows, val_set_size=2)
        columns = ["row_id", "source", "row_number", "prompt_ids", "prompt_length", "prompt", "row"]
        assert prepared.read().column_names == prepared.read("eval").column_names == columns
        assert (prepared.train_rows, prepared.eval_rows, prepared.manifest["kind"]) == (8, 2, "prompt")
        assert set(prepared.manifest["lengths"]) == {"prompt", "total"}
        for row in prepared.read().to_pylist():
            assert json.loads(row["row"]) == rows[row["row_id"]]
            assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
            assert row["prompt_length"] == len(row["prompt_ids"])

    def test_rows_are_the_same_when_their_other_columns_are_too(self, prepare_rows):
        rows = [{"prompt": "Q", "answer": answer} for answer in (1, 2, 1)]
        prepared = prepare_rows(rows, dataset_exact_deduplication=True)
        assert prepared.read()["row_id"].to_pylist() == [0, 1]

    @pytest.mark.parametrize("strategy", ["drop", "truncate"])
    def test_a_long_prompt_is_never_cut(self, prepare_rows, strategy):
        prepared = prepare_rows([{"prompt": "12345"}, {"prompt": "123456"}], sequence_len=5, excess_length_strategy=strategy)
        assert prepared.read()["prompt"].to_pylist() == ["12345"]
        assert prepared.manifest["sources"][0]["too_long"] == 1

    def test_a_long_prompt_raises(self, prepare_rows):
        with pytest.raises(UserError, match="excess_length_strategy: raise, and row 1 of .*a.jsonl has 6 tokens"):
            prepare_rows([{"prompt": "123456"}], sequence_len=5, excess_length_strategy="raise")

    def test_text_and_messages_do_not_mix(self, tmp_path, prepare_rows):
        message = (
            "datasets: 1 of 3 prompts are messages and the others are text, .*chat_template.default, which makes them text"
        )
        with pytest.raises(UserError, match=message):
            prepare_rows([{"prompt": "Q"}, {"prompt": [QUESTION]}, {"prompt": "R"}])
        other = {"path": str(write_jsonl(tmp_path / "b.jsonl", [{"messages": [QUESTION]}])), "type": "chat_template.default"}
        assert prepare_rows([{"prompt": "Q"}], other).train_rows == 2

    def test_a_reward_column_that_is_not_unicode(self, prepare_rows):
        prepared = prepare_rows([{"prompt": "Q", "answer": "\ud83d"}, {"prompt": "Q"}], max_rejected_fraction=0.5)
        assert "not valid Unicode" in prepared.read("rejected")["reason"][0].as_py()

    def test_the_preview_shows_the_other_columns(self, tokenizer, prepare_rows):
        out = io.StringIO()
        prepared = prepare_rows([{"prompt": "How much?", "answer": "four", "tests": [1, 2], "text": "x" * 500}])
        Console(file=out, width=600, no_color=True).print(Preview(prepared, tokenizer))
        text = out.getvalue()
        assert "prompt 9 tokens\nHow much?\nanswer four\ntests [1, 2]\n" in text
        assert f"text {'x' * 400} ...\n" in text
        assert "Trained tokens" not in text

    @pytest.mark.skipif(not SHARED_DATA.exists(), reason="the real data are not here")
    def test_real_pairs(self, tmp_path, tokenizer):
        dataset = {
            "path": str(SHARED_DATA / "dpo_zh_demo.json"),
            "type": "chat_template.default",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
        }
        prepared = prepare_here(make_config(tmp_path, dataset, rl="grpo", sequence_len=10**6), tokenizer)
        raw = json.loads((SHARED_DATA / "dpo_zh_demo.json").read_text())
        assert prepared.train_rows + prepared.rejected_rows == 300
        for row in prepared.read().to_pylist()[::37]:
            handed, given = json.loads(row["row"]), raw[row["row_id"]]
            assert handed == {**given, "prompt": row["prompt"]}
            assert given["conversations"][-1]["value"] in row["prompt"]
