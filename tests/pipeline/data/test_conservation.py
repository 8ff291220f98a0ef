"""Law 12: what a row says stands in the text once and in its place, the rest is the template's; and what comes of odd rows."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import load_transform
from pipeline.data.tokenize import tokenise
from pipeline.data.transforms import RowError
from pipeline.report.rows import Rows
from strategies.models.chat_templates import known_chat_templates, resolve_chat_template
from tests.pipeline.data.conftest import make_config, prepare_here, with_bos, write_jsonl
from tests.tiny import tiny_tokenizer

U, V = {"role": "user", "content": "What is 2 + 2?"}, {"role": "user", "content": "And 3 + 3?"}
CHAT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def said(text: Any, role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def with_template(name: str) -> Any:
    """The tiny tokenizer with a template: a built-in one's name, or Jinja."""
    tokenizer = with_bos(tiny_tokenizer())
    jinja = None if name in known_chat_templates() else name
    tokenizer.chat_template = resolve_chat_template(None if jinja else name, jinja, tokenizer)
    return tokenizer


class TestOneNormalForm:
    """A row means the same under every type that takes it."""

    def test_a_prompt_that_the_answers_repeat(self, tokenizer: Any) -> None:
        row = {"prompt": [U], "chosen": [U, said("4")], "rejected": [U, said("5")]}
        rendered = load_transform(None, tokenizer=tokenizer).rows(row)[0]
        assert rendered.as_row() == {"prompt": CHAT, "chosen": "4<|im_end|>\n", "rejected": "5<|im_end|>\n"}
        assert [note.kind for note in rendered.notes] == ["prompt_repeated", "prompt_repeated"]

    @pytest.mark.parametrize("type", [None, "chat_template.default", "chat_template.argilla_chat", "chatml.argilla_chat"])
    def test_a_users_turn_is_no_answer(self, tokenizer: Any, type: str | None) -> None:
        whole = type is not None and type.endswith("chat")
        head = [U] if whole else []
        row = {"chosen": [*head, said("4")], "rejected": [*head, said("five", "user")]}
        row |= {} if whole else {"messages" if type else "prompt": [U]}  # type: ignore[dict-item]
        with pytest.raises(RowError, match=r"'rejected' holds a turn of user \('five'\)"):
            load_transform(type, tokenizer=tokenizer)(row)

    @pytest.mark.parametrize("type", [None, "chat_template.argilla_chat"])
    def test_turns_of_the_user_after_the_answers_part(self, tokenizer: Any, type: str | None) -> None:
        row = {"chosen": [U, said("4"), V, said("6")], "rejected": [U, said("5"), V, said("7")]}
        with pytest.raises(RowError, match="holds a turn of user"):
            load_transform(type, tokenizer=tokenizer)(row)

    def test_an_answer_of_its_own_column_is_the_judged_one(self, tokenizer: Any) -> None:
        transform = load_transform("chat_template.default", rl="kto", tokenizer=tokenizer, field_completion="answer")
        context = [U, said("4"), V, said("five")]
        row = transform({"messages": context, "answer": "six", "label": True})
        assert row["completion"] == "six<|im_end|>"
        assert "five" in row["prompt"]

    def test_a_conversation_that_ends_in_that_answer(self, tokenizer: Any) -> None:
        transform = load_transform("chat_template.default", rl="kto", tokenizer=tokenizer, field_completion="answer")
        row = transform({"messages": [U, said("4")], "answer": "4", "label": True})
        assert row == {"prompt": CHAT, "completion": "4<|im_end|>", "label": True}

    @pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "qwen3", "gemma3"])
    @pytest.mark.parametrize("key", ["text", "value"])
    def test_parts_of_a_content(self, template: str, key: str) -> None:
        tokenizer = with_template(template)
        parts = [{"type": "text", key: "What is"}, {"type": "text", key: "2 + 2?"}]
        text = "What is\n2 + 2?"
        rows = [
            {"prompt": [said(content, "user")], "chosen": [said("4")], "rejected": [said("5")]} for content in (parts, text)
        ]
        assert len({str(load_transform(None, tokenizer=tokenizer)(row)) for row in rows}) == 1

    def test_a_part_that_is_no_text(self, tokenizer: Any) -> None:
        content = [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]
        with pytest.raises(RowError, match=r"prompt\[0\].content\[1\] is of type 'image'"):
            load_transform(None, tokenizer=tokenizer)({"prompt": [said(content, "user")], **PAIR})

    def test_the_system_text_of_a_column(self, tokenizer: Any) -> None:
        row = {"conversations": [U], "system": "Be brief.", "chosen": "4", "rejected": "5"}
        transform = load_transform("chat_template.default", tokenizer=tokenizer, field_messages="conversations")
        assert transform(row)["prompt"] == "<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT
        untyped = {"prompt": [U], "system": "Be brief.", **PAIR}
        assert load_transform(None, tokenizer=tokenizer)(untyped)["prompt"].startswith("<|im_start|>system\nBe brief.")

    def test_two_system_texts(self, tokenizer: Any) -> None:
        row = {"prompt": [said("Be long.", "system"), U], "system": "Be brief.", **PAIR}
        with pytest.raises(RowError, match="say different things"):
            load_transform(None, tokenizer=tokenizer)(row)


PAIR = {"chosen": [said("4")], "rejected": [said("5")]}


def test_arguments_of_a_tool_have_one_form(tmp_path: Any) -> None:
    """As an object, as JSON text, and from Parquet, which gives every object the members of all."""
    tokenizer = with_template("qwen3")
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "clock")]
    calls = [("weather", {"city": 'Oslo "north"'}), ("clock", {"zone": "CET"})]

    def calls_in(form: Any) -> list[dict[str, Any]]:
        functions = [{"name": name, "arguments": form(arguments)} for name, arguments in calls]
        answers = [said("", tool_calls=[{"type": "function", "function": function}]) for function in functions]
        return [{"prompt": [U], "chosen": [one], "rejected": [said("5")], "tools": json.dumps(tools)} for one in answers]

    pq.write_table(pa.Table.from_pylist(calls_in(dict)), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", calls_in(dict))
    write_jsonl(tmp_path / "texts.jsonl", calls_in(json.dumps))
    stores = [
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / name)}), tokenizer)
        for name in ("rows.jsonl", "texts.jsonl", "rows.parquet")
    ]
    ids = [store.read("train", ["prompt_ids", "chosen_ids", "rejected_ids"]).to_pydict() for store in stores]
    assert ids[0] == ids[1] == ids[2]
    assert '{"city": "Oslo \\"north\\""}' in stores[2].read("train", ["chosen"])["chosen"][0].as_py()


class TestPlainText:
    def test_a_prompt_that_both_answers_repeat(self, tokenizer: Any) -> None:
        row = {"prompt": "Q: 1?\nA:", "chosen": "Q: 1?\nA: 7", "rejected": "Q: 1?\nA: 8"}
        rendered = load_transform(None, tokenizer=tokenizer).rows(row)[0]
        assert rendered.as_row() == {"prompt": "Q: 1?\nA:", "chosen": " 7", "rejected": " 8"}
        assert [note.kind for note in rendered.notes] == ["prompt_repeated"]

    def test_a_greeting_is_answered_by_a_greeting(self, tokenizer: Any) -> None:
        row = {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi, you"}
        assert load_transform(None, tokenizer=tokenizer)(row) | {"prompt": "Hi"} == row

    def test_a_dialogue_is_divided_at_its_last_shared_header(self, tokenizer: Any) -> None:
        head = "\n\nHuman: 6 * 7?\n\nAssistant: Hm.\n\nHuman: So?\n\nAssistant:"
        row = load_transform(None, tokenizer=tokenizer)({"chosen": f"{head} 42", "rejected": f"{head} 43"})
        assert row == {"prompt": head, "chosen": " 42", "rejected": " 43"}

    def test_an_answer_holds_no_other_turn(self, tokenizer: Any) -> None:
        head = "\n\nHuman: 6 * 7?\n\nAssistant:"
        row = {"chosen": f"{head} 42", "rejected": f"{head} 43\n\nHuman: Sure?\n\nAssistant: Yes"}
        with pytest.raises(RowError, match="'rejected' holds another turn \\('Human:'\\)"):
            load_transform(None, tokenizer=tokenizer)(row)

    def test_no_word_is_cut(self, tokenizer: Any) -> None:
        row = load_transform(None, tokenizer=tokenizer)({"chosen": "The answer is 42.", "rejected": "The answer is 43."})
        assert row == {"prompt": "The answer is", "chosen": " 42.", "rejected": " 43."}

    @pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "", "\n"])
    def test_one_end(self, tokenizer: Any, end: str) -> None:
        text = load_transform(None, tokenizer=tokenizer).rows({"prompt": "Q: ", "chosen": f"4{end}", "rejected": f"5{end}"})
        (ids,) = tokenise(text, tokenizer)
        for completion in ids.completions:
            assert completion.tolist().count(tokenizer.eos_token_id) == 1
            assert completion[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize("text", ['[{"role": "user", "content": "Q"}, {"role": "ass', "[{'role': 'user', 'content': 'Q'}]"])
    @pytest.mark.parametrize("type", [None, "chat_template.default", "chatml.intel", "user_defined"])
    def test_the_text_of_a_conversation_is_no_answer(self, tokenizer: Any, text: str, type: str | None) -> None:
        row = {"prompt": "Q", "messages": "Q", "question": "Q", "chosen": text, "rejected": "R"}
        with pytest.raises(RowError, match="'chosen' is the text of a conversation, not an answer"):
            load_transform(type, tokenizer=tokenizer)(row)

    @pytest.mark.parametrize("label", ["1.0", "1", "true", "True", 1.0, True])
    def test_labels(self, label: Any) -> None:
        assert load_transform(None, rl="kto")({"prompt": "Q", "completion": "C", "label": label})["label"] is True


NO_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CUTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LAST_DIFFERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'user' %} (answer this){% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWICE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.content }}<|im_end|>\n{% endfor %}"


class TestTemplates:
    """What a template does to the text is seen."""

    def rendered(self, template: str, **row: Any) -> Any:
        return load_transform(None, tokenizer=with_template(template)).rows({"prompt": [U], **PAIR, **row})[0]

    def test_no_end_of_an_answer(self) -> None:
        found = self.rendered(NO_END)
        answers = {"chosen": "4<|im_end|>", "rejected": "5<|im_end|>"}
        assert found.as_row() == {"prompt": "[user] What is 2 + 2?\n[assistant] ", **answers}
        assert ("end_added", "<|im_end|>") in {(note.kind, note.detail) for note in found.notes}

    def test_an_end_that_is_there_already(self) -> None:
        found = self.rendered("chatml", chosen=[said("4<|im_end|>")])
        assert found.as_row()["chosen"] == "4<|im_end|>\n"
        assert [note.kind for note in found.notes] == ["end_given"]

    def test_reasoning_that_is_cut(self) -> None:
        found = self.rendered(CUTS, chosen=[said("<think>\nsum\n</think>\n\n4")])
        assert {(note.kind, note.detail) for note in found.notes} == {
            ("reasoning_dropped", "of the answer"),
            ("opening_missing", "<think>"),
        }

    def test_an_answer_that_begins_as_the_opening_does(self) -> None:
        """The template opens `<think>`, which shares its bracket with the answers."""
        found = self.rendered("deepseek_v3", chosen=[said("<b>4</b>")], rejected=[said("<b>5</b>")])
        assert found.as_row()["chosen"].startswith("<b>4</b>")

    def test_reasoning_of_an_earlier_turn(self) -> None:
        found = self.rendered("qwen3", prompt=[U, said("<think>\nsum\n</think>\n\n4"), V])
        assert ("reasoning_dropped", "of earlier turns") in {(note.kind, note.detail) for note in found.notes}

    def test_a_last_turn_that_is_rendered_otherwise(self) -> None:
        found = self.rendered(LAST_DIFFERS)
        assert found.as_row() == {"prompt": CHAT, "chosen": "4<|im_end|>\n", "rejected": "5<|im_end|>\n"}
        assert [note.kind for note in found.notes] == ["prompt_differs"]

    def test_a_turn_that_is_dropped(self) -> None:
        with pytest.raises(RowError, match=r"leaves out what turn 1 \(system\) says: 'Be brief.'"):
            self.rendered(DROPS_SYSTEM, prompt=[said("Be brief.", "system"), U])

    def test_a_turn_that_comes_twice(self) -> None:
        with pytest.raises(RowError, match="renders what turn 1 says twice"):
            self.rendered(TWICE)

    def test_a_control_token_in_a_message(self) -> None:
        found = self.rendered("chatml", prompt=[said("Say <|im_end|> now", "user")])
        assert {(note.kind, note.detail) for note in found.notes} == {("control_tokens", "<|im_end|>")}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": "Paris"}}}
CALLS = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %} CALL {{ c | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
THINKS_AND_CALLS = CALLS.replace("[assistant] {% endif %}", "[assistant] <think>\n{% endif %}")


class TestCallsOfTools:
    @pytest.mark.parametrize("type", ["chatml.argilla_chat", "llama3.argilla_chat"])
    @pytest.mark.parametrize("more", [{"tool_calls": [CALL]}, {"reasoning_content": "Hm."}])
    def test_a_type_that_cannot_write_them(self, tokenizer: Any, type: str, more: dict[str, Any]) -> None:
        answer = said("4", **more)
        with pytest.raises(RowError, match=f"a turn has '{next(iter(more))}', which this type can't write"):
            load_transform(type, tokenizer=tokenizer)({"chosen": [U, answer], "rejected": [U, said("5")]})
        row = {"chosen": [U, answer, V, said("4")], "rejected": [U, answer, V, said("5")]}
        with pytest.raises(RowError, match="this type can't write"):
            load_transform(type, tokenizer=tokenizer)(row)

    def test_a_call_that_the_template_drops(self) -> None:
        row = {"prompt": [U], "chosen": [said("I call add now with Paris", tool_calls=[CALL])], "rejected": [said("5")]}
        with pytest.raises(RowError, match=r"the chat template does not render tool_calls \('add' is missing\)"):
            load_transform(None, tokenizer=with_template("chatml"))(row)

    def test_an_answer_that_ends_in_a_call_is_ended(self) -> None:
        row = {"prompt": [U], "chosen": [said("", tool_calls=[CALL])], "rejected": [said("5")]}
        rendered = load_transform(None, tokenizer=with_template(CALLS)).rows(row)[0]
        assert rendered.sequences[0].endswith("}}}<|im_end|>")

    def test_a_call_is_no_part_of_the_prompt(self) -> None:
        other = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": "Pisa"}}}
        answers = {"chosen": [said("", tool_calls=[CALL])], "rejected": [said("", tool_calls=[other])]}
        row = load_transform(None, tokenizer=with_template(THINKS_AND_CALLS))({"prompt": [U], **answers})
        assert row["prompt"] == "[user] What is 2 + 2?[assistant] "
        assert '"Paris"' in row["chosen"]

    def test_null_that_was_given_stays(self) -> None:
        call = {"function": {"name": "add", "arguments": '{"a": null, "city": "Paris"}'}}
        row = {"prompt": [U], "chosen": [said("", tool_calls=[call])], "rejected": [said("5")]}
        assert '"a": null' in load_transform(None, tokenizer=with_template("qwen3"))(row)["chosen"]


B = said("B", "user")


class TestOddRows:
    """What fresh eyes brought, and what came of it before: text that was lost or doubled, or a traceback."""

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "A", "chosen": [B, said("x")], "rejected": [B, said("y")]}, "'prompt' is not"),
            ({"prompt": "A", "chosen": [U, said("x")], "rejected": [V, said("y")]}, "answer different prompts"),
            ({"prompt": "A", "chosen": [U, said("x")], "rejected": [U, said("y"), V, said("z")]}, "different prompts"),
        ],
    )
    def test_ultra_compares_the_turns(self, tokenizer: Any, row: dict[str, Any], reason: str) -> None:
        with pytest.raises(RowError, match=reason):
            load_transform("chatml.ultra", tokenizer=tokenizer)(row)

    def test_ultra_keeps_a_system_turn(self, tokenizer: Any) -> None:
        row = {"prompt": "Q", **{name: [said("Be brief.", "system"), said(name)] for name in ("chosen", "rejected")}}
        assert "Be brief." in load_transform("chatml.ultra", tokenizer=tokenizer)(row)["prompt"]

    @pytest.mark.parametrize("type", [None, "chatml.prompt_pairs", "user_defined"])
    @pytest.mark.parametrize("prompt", ["[{'role': 'user', 'content': 'hi'}]", '[{"role": "user", "content": "hi"}]'])
    def test_a_conversation_as_a_prompt_of_text(self, tokenizer: Any, type: str | None, prompt: str) -> None:
        with pytest.raises(RowError, match="the text of a conversation|all must be messages or all text"):
            load_transform(type, tokenizer=tokenizer)({"prompt": prompt, "chosen": "a", "rejected": "b"})

    @pytest.mark.parametrize(
        "answer", ['{"from": "Ann", "to": "Bob"}', '[{"role": "Engineer", "years": 3}]', '{"role": "admin"}']
    )
    def test_an_answer_that_is_json(self, tokenizer: Any, answer: str) -> None:
        row = {"messages": "Q", "chosen": answer, "rejected": "b"}
        assert load_transform("chat_template.default", tokenizer=tokenizer)(row)["chosen"] == answer + "<|im_end|>"

    @pytest.mark.parametrize("answer", ["[" * 1200, "[" + "7" * 5000 + "]"])
    def test_brackets_and_digits_without_end(self, tokenizer: Any, answer: str) -> None:
        row = load_transform("chat_template.default", tokenizer=tokenizer)({"messages": "Q", "chosen": "a", "rejected": answer})
        assert row["rejected"] == answer + "<|im_end|>"

    @pytest.mark.parametrize("content", [None, "", "  "])
    def test_an_empty_question(self, tokenizer: Any, content: str | None) -> None:
        with pytest.raises(RowError, match="turn 1 of the prompt, of the user, is empty"):
            load_transform(None, tokenizer=tokenizer)({"prompt": [said(content, "user")], **PAIR})

    def test_a_tool_whose_word_is_in_the_markup(self) -> None:
        prompt = [U, said("", tool_calls=[CALL]), said("end", "tool"), V]
        with pytest.raises(RowError, match="leaves out what turn 3|does not render tool_calls"):
            load_transform(None, tokenizer=with_template("phi_3"))({"prompt": prompt, **PAIR})

    def test_answers_that_repeat_the_question_after_a_system_column(self, tokenizer: Any) -> None:
        row = {"messages": [U], "system": "Be brief.", "chosen": [U, said("4")], "rejected": [U, said("5")]}
        made = load_transform("chat_template.default", tokenizer=tokenizer)(row)
        assert (made["prompt"].count("2 + 2"), made["chosen"]) == (1, "4<|im_end|>")

    def test_a_quiz_is_no_dialogue(self, tokenizer: Any) -> None:
        row = {"prompt": "\n\nHuman: A quiz.\n\nAssistant:", "chosen": " Q: 1?\n\nA: 2", "rejected": " No."}
        assert load_transform(None, tokenizer=tokenizer)(row)["chosen"] == " Q: 1?\n\nA: 2"

    def test_scripts_without_spaces(self, tokenizer: Any) -> None:
        row = load_transform(None, tokenizer=tokenizer)({"chosen": "問題の答えは青", "rejected": "問題の答えは赤"})
        assert row["prompt"] == "問題の答えは"

    def test_a_rank_that_is_no_number(self, tokenizer: Any) -> None:
        answers = [{"answer": "a", "rank": float("nan")}, {"answer": "b", "rank": 1.0}]
        with pytest.raises(RowError, match=r"answers\[0\] must have 'answer' and a number as 'rank'"):
            load_transform("zephyr.nectar", tokenizer=tokenizer)({"prompt": "Q", "answers": answers})

    @pytest.mark.parametrize(
        ("text", "ended"), [("4<s>", "4<s><|im_end|>"), ("4<|im_end|><|im_end|>\n", "4<|im_end|>"), ("4", "4<|im_end|>")]
    )
    def test_ends_of_plain_text(self, bos_tokenizer: Any, text: str, ended: str) -> None:
        rows = load_transform(None, tokenizer=bos_tokenizer).rows({"prompt": "Q: ", "chosen": text, "rejected": "5"})
        (ids,) = tokenise(rows, bos_tokenizer)
        assert bos_tokenizer.decode(ids.completions[0]) == ended

    def test_answers_of_control_tokens(self, tmp_path: Any, tokenizer: Any) -> None:
        rows = [
            {"prompt": "Q: ", "chosen": "<|im_end|>", "rejected": "5"},
            {"prompt": "Q: ", "chosen": "4<|im_end|> and more", "rejected": "5"},
        ]
        cfg = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}, max_rejected_fraction=0.5)
        store = prepare_here(cfg, tokenizer)
        assert store.read("rejected")["reason"].to_pylist() == ["an answer is nothing but control tokens"]
        (note,) = store.notes
        assert note.startswith("1 row: the text of a message holds '<|im_end|>', which the tokenizer reads as a control token")

    @pytest.mark.parametrize("answer", ["<|im_end|>", " <|im_end|>\n"])
    @pytest.mark.parametrize("type", ["chat_template.default", "chatml.prompt_pairs"])
    def test_an_answer_that_is_its_end(self, tokenizer: Any, type: str, answer: str) -> None:
        with pytest.raises(RowError, match="is empty but for its end"):
            load_transform(type, tokenizer=tokenizer)({"messages": "Q", "prompt": "Q", "chosen": answer, "rejected": "5"})

    def test_nothing_but_reasoning_that_is_dropped(self, tokenizer: Any) -> None:
        row = {"prompt": [U], "chosen": [said("", reasoning_content="Hm.")], "rejected": [said("5")]}
        with pytest.raises(RowError, match="nothing but reasoning"):
            load_transform(None, tokenizer=tokenizer)(row)

    def test_a_tag_of_reasoning_within_an_answer(self) -> None:
        row = {"prompt": [U], "chosen": [said("Use the tag </think> to close it.")], "rejected": [said("5")]}
        notes = load_transform(None, tokenizer=with_template("qwen3")).rows(row)[0].notes
        assert "think_tags" in {note.kind for note in notes}

    def test_a_template_that_fails(self) -> None:
        with pytest.raises(RowError, match="does not take this conversation: .*by zero"):
            load_transform(None, tokenizer=with_template("{{ 1 // 0 }}"))({"prompt": [U], **PAIR})


class TestNotes:
    def test_once_with_count_and_example(self, tmp_path: Any, tokenizer: Any) -> None:
        row = {"prompt": [U], "chosen": [U, said("4")], "rejected": [U, said("5")], "score": 1, "id": "a"}
        path = write_jsonl(tmp_path / "rows.jsonl", [row, row | {"score": 2}, {"prompt": [V], **PAIR}])
        store = prepare_here(make_config(tmp_path, {"path": str(path)}), tokenizer)
        (repeated, unread), place = store.notes, f"({path} row 1"
        assert repeated.startswith(f"2 rows: answers begin with the prompt of their row, which is taken once {place}: '5')")
        assert unread.startswith(f"2 rows: no part of the text: column 'score', 'id' {place})")

    def test_on_the_page_of_a_run(self, tmp_path: Any, tokenizer: Any) -> None:
        path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [U], **PAIR, "score": 1}])
        cfg = make_config(tmp_path, {"path": str(path)}, micro_batch_size=1)
        store = prepare_here(cfg, tokenizer)
        (section,) = (section for section in Rows.of(cfg, store.fingerprint).sections if section.name == "data-notes")
        assert section.table is not None
        assert [row.cells for row in section.table.rows] == [[note] for note in store.notes]
        assert len(store.notes) == 1

    def test_pictures_are_refused(self, tmp_path: Any, tokenizer: Any) -> None:
        row = {"prompt": [U], **PAIR, "images": ["a.png"]}
        with pytest.raises(RowError, match="the column 'images' is no text"):
            load_transform(None, tokenizer=tokenizer).rows(row)


WORDS = [
    "a",
    "4",
    "Yes.",
    "no\nline",
    '"quoted"',
    "tab\tbed",
    "größer 日本",
    "{x: 1}",
    "<b>",
    "user",
    "assistant",
    "  two",
    "end ",
]


def conversations(seed: int, number: int) -> Iterator[tuple[list[dict[str, Any]], str, str]]:
    """Prompts of one to three exchanges, with or without a system turn, and two answers; by a seed."""
    random_ = random.Random(seed)

    def text() -> str:
        return " ".join(random_.choices(WORDS, k=random_.randint(1, 5)))

    for _ in range(number):
        turns = [said(text(), role) for _ in range(random_.randint(0, 2)) for role in ("user", "assistant")]
        system = [said(text(), "system")] if random_.random() < 0.3 else []
        chosen, rejected = text(), text()
        if chosen.strip() != rejected.strip():
            yield [*system, *turns, said(text(), "user")], chosen, rejected


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def check_text(text: str, strings: list[str], answer: str, start: int) -> None:
    """The strings stand in order before `start`, there the answer begins, and after it one end of the turn stands."""
    cursor = 0
    for string in strings:
        at = text.find(string.strip(), cursor)
        assert at >= 0, (string, text)
        cursor = at + len(string.strip())
    assert cursor <= start
    after = text[start:].removeprefix(EMPTY_THOUGHT)
    said_so = next(form for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()) if after.startswith(form))
    end = after[len(said_so) :].strip()
    assert end in ENDS or end.removesuffix("<|im_end|>") in ENDS  # which closes what is text to this tokenizer


ENDS = {
    "<|end|>\n<|im_end|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
}


Row = tuple[str, str | None, dict[str, Any], list[str]]
"""Method, dataset type, row, and its answers."""


def rows_of_messages(prompt: list[dict[str, Any]], chosen: str, rejected: str) -> Iterator[Row]:
    """A conversation in the shape of each type that a chat template renders."""
    both = [chosen, rejected]
    yield "dpo", None, {"prompt": prompt, "chosen": [said(chosen)], "rejected": [said(rejected)]}, both
    yield "dpo", "chat_template.default", {"messages": prompt, "chosen": chosen, "rejected": rejected}, both
    whole = {"chosen": [*prompt, said(chosen)], "rejected": [*prompt, said(rejected)]}
    yield "dpo", None, whole, both
    yield "dpo", "chat_template.argilla_chat", whole, both
    yield "kto", None, {"prompt": prompt, "completion": [said(chosen)], "label": True}, [chosen]
    yield "kto", "chat_template.default", {"messages": prompt, "completion": chosen, "label": True}, [chosen]
    yield "kto", "chat_template.argilla_chat", {"completion": [*prompt, said(chosen)], "label": False}, [chosen]
    yield "grpo", "chat_template.default", {"messages": prompt}, []
    yield "grpo", "chat_template.argilla_chat", whole, []


def rows_of_text(question: str, chosen: str, rejected: str) -> Iterator[Row]:
    """A question in the shape of each type that writes turns itself, or none."""
    pair, both = {"chosen": chosen, "rejected": rejected}, [chosen, rejected]
    asked = said(question, "user")
    whole = {"chosen": [asked, said(chosen)], "rejected": [asked, said(rejected)]}
    columns = {"default": "prompt", "argilla": "instruction", "icr": "input", "intel": "question", "prompt_pairs": "prompt"}
    for family in ("chatml", "llama3"):
        for shape, column in columns.items():
            yield "dpo", f"{family}.{shape}", {column: question, **pair}, both
            yield "grpo", f"{family}.{shape}", {column: question}, []
        for shape in ("ultra", "argilla_chat"):
            yield "dpo", f"{family}.{shape}", {"prompt": question, **whole}, both
        for shape in ("default", "argilla", "intel", "prompt_pairs"):
            yield "kto", f"{family}.{shape}", {columns[shape]: question, "completion": chosen, "label": True}, [chosen]
        yield "kto", f"{family}.argilla_chat", {"completion": [asked, said(chosen)], "label": True}, [chosen]
    yield "dpo", None, {"prompt": question, **pair}, both
    yield "dpo", "user_defined", {"prompt": question, **pair}, both
    yield "kto", None, {"prompt": question, "completion": chosen, "label": True}, [chosen]
    yield "kto", "user_defined", {"prompt": question, "completion": chosen, "label": True}, [chosen]
    answers = [{"answer": chosen, "rank": 1}, {"answer": rejected, "rank": 2}]
    yield "dpo", "zephyr.nectar", {"prompt": question, "answers": answers}, both


def check_row(tokenizer: Any, made: Row, strings: list[str]) -> None:
    """Every string once and in order, then the answer, then one end; and the ids are those of the text."""
    rl, type, row, answers = made
    (rendered,) = load_transform(type, rl, tokenizer).rows(row)
    if rl == "grpo":
        cursor = 0
        for string in strings:
            cursor = rendered.prompt.index(string.strip(), cursor) + len(string.strip())
        return
    start = len(rendered.as_row()["prompt"])
    for text, answer in zip(rendered.sequences, answers, strict=True):
        check_text(
            text if rendered.templated else text.rstrip() + tokenizer.eos_token * (not ends(text)), strings, answer, start
        )
    (ids,) = tokenise([rendered], tokenizer)
    for text, completion in zip(rendered.sequences, ids.completions, strict=True):
        decoded = tokenizer.decode(np.concatenate([ids.prompt, completion]))
        assert decoded == text if rendered.templated else decoded.removeprefix(tokenizer.bos_token).startswith(text.rstrip())
        assert completion.tolist().count(tokenizer.eos_token_id) == 1 or rendered.templated


def ends(text: str) -> bool:
    return any(text.rstrip().endswith(end) for end in ENDS)


def check_law(template: str, seed: int, number: int, every: int = 1) -> None:
    """Rows of every type of messages, of generated conversations; of each only one in so many types, in turn."""
    tokenizer = with_template(template)
    kept, refused, tried = Counter[tuple[str, str | None]](), set(), 0
    for prompt, chosen, rejected in conversations(seed, number):
        tried += 1
        for made in islice(rows_of_messages(prompt, chosen, rejected), tried % every, None, every):
            try:
                check_row(tokenizer, made, [message["content"] for message in prompt])
            except RowError as error:
                refused.add(str(error).partition(":")[0])
                continue
            kept[made[:2]] += 1
    assert min(kept.values()) > tried / 2 / every and len(kept) == 8
    assert refused <= {"the chat template does not take this conversation"}


def check_law_of_text(seed: int, number: int, every: int = 1) -> None:
    """Rows of every other type, of generated questions; as `check_law`."""
    tokenizer, kept = with_template("chatml"), Counter[tuple[str, str | None]]()
    generated = [(prompt[-1]["content"], *answers) for prompt, *answers in conversations(seed, number)]
    for tried, (question, chosen, rejected) in enumerate(generated):
        for made in islice(rows_of_text(question, chosen, rejected), tried % every, None, every):
            check_row(tokenizer, made, [question])
            kept[made[:2]] += 1
    assert min(kept.values()) >= len(generated) // every and len(kept) == 39


@pytest.mark.parametrize("template", known_chat_templates())
def test_generated_conversations(template: str) -> None:
    check_law(template, seed=1, number=100)


def test_generated_questions() -> None:
    check_law_of_text(seed=1, number=100)


@pytest.mark.many
def test_many_generated_questions() -> None:
    check_law_of_text(seed=2, number=2000, every=10)


@pytest.mark.many
@pytest.mark.parametrize("template", known_chat_templates())
def test_many_generated_conversations(template: str) -> None:
    check_law(template, seed=2, number=2000, every=3)
