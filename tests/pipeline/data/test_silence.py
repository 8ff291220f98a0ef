"""What is wrong with rows and files, and was trained in silence: it is refused, or told."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.transforms import RowError, load_transform
from pipeline.errors import UserError
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny import pairs

USER = {"role": "user", "content": "What is 2 + 2?"}
ASKED = {"messages": [USER], "chosen": "It is 4.", "rejected": "It is 5."}
CHAT = {"type": "chat_template.default"}


def prepared(folder: Path, tokenizer: Any, rows: list[Any], dataset: dict[str, Any] | None = None, **keys: Any) -> Any:
    given = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), **(CHAT if dataset is None else dataset)}
    return prepare_here(make_config(folder, given, **keys), tokenizer)


def refused(folder: Path, tokenizer: Any, rows: list[Any], dataset: dict[str, Any] | None = None, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        prepared(folder, tokenizer, rows, dataset, max_rejected_fraction=0.0, **keys)
    return str(error.value)


def end(ids: list[int], tokenizer: Any) -> bool:
    return ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template", ["gemma", "gemma3", "cohere", "{% for m in messages %}{{m.content}}[END]{% endfor %}"])
def test_an_end_that_is_no_token_is_told_and_the_tokenizers_own_added(tmp_path: Path, tokenizer: Any, template: str) -> None:
    key = "chat_template_jinja" if "{" in template else "chat_template"
    found = prepared(tmp_path, tokenizer, [ASKED], {**CHAT, key: template})
    row = found.read().to_pylist()[0]
    assert end(row["chosen_ids"], tokenizer) and end(row["rejected_ids"], tokenizer)
    assert "is no token of the tokenizer, but text; its own end token is added" in "\n".join(found.notes)


def test_the_end_of_another_tokenizers_type_is_told(tmp_path: Path, tokenizer: Any) -> None:
    found = prepared(tmp_path, tokenizer, [{"prompt": "Q", "chosen": "4", "rejected": "5"}], {"type": "llama3.prompt_pairs"})
    assert "what ends an answer, '<|eot_id|>', is no token of the tokenizer" in "\n".join(found.notes)


QUOTES = {
    "never closed": 'q1,a1,"b1\nq2,a2,b2\nq3,a3,b3\n',
    "closed by another's": 'q1,a1,"b1\nq2,"a2",b2\n',
    "escaped otherwise": 'q1,"He said \\"hi\\" to me",b1\n',
}


@pytest.mark.parametrize("name", list(QUOTES))
def test_quotes_of_csv_that_do_not_fit(tmp_path: Path, tokenizer: Any, name: str) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected\n{QUOTES[name]}")
    with pytest.raises(UserError, match=r"a\.csv: a quote is not closed, or closed within a cell, up to line \d"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer)


def test_a_column_of_csv_that_is_named_twice(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,chosen\nq,a1,b1,zzz\n")
    with pytest.raises(UserError, match="the header names the column 'chosen' twice"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer)


SYSTEM = {"system": "Answer in French.", "question": "What is 2 + 2?", "chosen": "4", "rejected": "5"}


def test_a_system_text_without_a_place(tmp_path: Path, tokenizer: Any) -> None:
    found = prepared(tmp_path, tokenizer, [SYSTEM], {"type": {"field_prompt": "question"}})
    assert "no part of the text: column 'system'" in found.notes[0]
    named = {"field_prompt": "question", "field_system": "system"}
    assert "no part of the text: column 'system'" in prepared(tmp_path, tokenizer, [SYSTEM], {"type": named}).notes[0]
    whole = prepared(tmp_path, tokenizer, [SYSTEM], {"type": {**named, "prompt_format": "{system}\n{question}\n"}})
    assert whole.read()["prompt"].to_pylist() == ["Answer in French.\nWhat is 2 + 2?\n"]


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_answers_that_repeat_a_prompt_that_is_formatted(tmp_path: Path, tokenizer: Any, rl: str) -> None:
    answers = (
        {"completion": "q one two a", "label": True} if rl == "kto" else {"chosen": "q one two a", "rejected": "q one two b"}
    )
    rows = [{"prompt": "q one two", **answers}]
    found = prepared(tmp_path, tokenizer, rows, {"type": {"prompt_format": "[INST] {prompt} [/INST]"}}, rl=rl)
    row = found.read().to_pylist()[0]
    assert row["prompt"] == "[INST] q one two [/INST]" and "q one two" not in row["completion" if rl == "kto" else "chosen"]
    assert "answers begin with the prompt of their row" in found.notes[0]


@pytest.mark.parametrize(
    ("prompt", "turn"), [("Answer in French. What is 2 + 2? Be rude.", "What is 2 + 2?"), ("art", "Start the car")]
)
@pytest.mark.parametrize("type_of", [None, "chatml.ultra"])
def test_a_prompt_column_that_says_something_else(
    tmp_path: Path, tokenizer: Any, type_of: str | None, prompt: str, turn: str
) -> None:
    turns = [{"role": "user", "content": turn}]
    answers = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    dataset = {} if type_of is None else {"type": type_of}
    assert "prompt" in refused(tmp_path, tokenizer, [{"prompt": prompt, **answers}], dataset)


def test_a_prompt_column_that_repeats_all_turns(tmp_path: Path, tokenizer: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]
    answers = {name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {"prompt": "user: What is 2 + 2?\nassistant: 4\nuser: And 3 + 3?", **answers}
    assert prepared(tmp_path, tokenizer, [row], {}).train_rows == 1


def test_properties_of_messages_that_no_template_speaks_of(tmp_path: Path, tokenizer: Any) -> None:
    row = {**ASKED, "messages": [{**USER, "weight": 0.5}]}
    assert "no part of the text: column 'weight of messages'" in prepared(tmp_path, tokenizer, [row]).notes[0]
    for name in ("images", "audio"):
        told = refused(tmp_path, tokenizer, [{**ASKED, "messages": [{**USER, name: ["a.png"]}]}])
        assert f"has '{name}', which is no text" in told
    both = {**ASKED, "messages": [{**USER, "value": "Something else"}]}
    keys = {**CHAT, "message_property_mappings": {"role": "role", "content": "value"}}
    assert "has both 'content' and 'value', which say different things" in refused(tmp_path, tokenizer, [both], keys)


def test_calls_of_functions_as_they_were_written_first_are_calls(tmp_path: Path, tokenizer: Any) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": '{"city": "Paris"}'}}
    row = {**ASKED, "messages": [USER, call, {"role": "function", "content": "sunny"}, USER]}
    told = refused(tmp_path, tokenizer, [row])
    assert "the chat template does not render tool_calls ('w' is missing)" in told
    found = prepared(tmp_path, tokenizer, [row], {**CHAT, "chat_template": "qwen_25"})
    assert '"city": "Paris"' in found.read()["prompt"].to_pylist()[0]


def test_templates_that_repeat_or_move_what_they_are_given(tmp_path: Path, tokenizer: Any) -> None:
    turn = (
        "{% for m in messages %}{{m.role}}: {{m.content}}{% if 'Paris' in m.content %} {{m.content}}{% endif %}\n{% endfor %}"
    )
    row = {**ASKED, "messages": [{"role": "user", "content": "What of Paris, today?"}]}
    told = prepared(tmp_path, tokenizer, [row], {**CHAT, "chat_template_jinja": turn}).notes
    assert any("the rendered text says more than once what a turn says once" in note for note in told)
    apart = (
        "{% for m in messages if m.role == 'user' %}{{m.content}}\n{% endfor %}"
        "{% for m in messages if m.role != 'user' %}A: {{m.content}}{{eos_token}}{% endfor %}"
    )
    turns = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And 3 + 3?"}]
    told = refused(tmp_path, tokenizer, [{**ASKED, "messages": turns}], {**CHAT, "chat_template_jinja": apart})
    assert "moves turn 2 (assistant) behind a later one" in told


def test_a_column_that_reward_functions_are_not_handed(tmp_path: Path, tokenizer: Any) -> None:
    table = pa.table({"prompt": ["What?"], "answer": [decimal.Decimal("4.0")], "day": [datetime.date(2026, 1, 1)]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.parquet")}, rl="grpo"), tokenizer)
    assert "reward functions aren't handed the column 'answer'" in "\n".join(found.notes)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("उत्तर: की", "उत्तर: कि", "उत्तर: "),
        ("So 👍🏽", "So 👍🏿", "So "),
        ("\r\n\r\nHuman: hi\r\n\r\nAssistant: It is four", "\r\n\r\nHuman: hi\r\n\r\nAssistant: It is five", None),
    ],
)
def test_a_shared_beginning_ends_before_a_whole_character(
    tmp_path: Path, tokenizer: Any, chosen: str, rejected: str, prompt: str | None
) -> None:
    row = prepared(tmp_path, tokenizer, [{"chosen": chosen, "rejected": rejected}], {}).read().to_pylist()[0]
    if prompt is None:
        assert row["prompt"].endswith("Assistant:") and row["chosen"].startswith(" It is four")
    else:
        assert row["prompt"].strip() == prompt.strip() and row["chosen"].startswith(chosen.removeprefix(prompt)[0:1])


def test_a_shard_that_is_missing(tmp_path: Path, tokenizer: Any) -> None:
    for number in (0, 2):
        write_jsonl(tmp_path / f"train-{number:05d}-of-00003.jsonl", [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards, such as train-00001-of-00003\.jsonl; fetch it again"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path)}), tokenizer)


def test_splits_in_capitals(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("TRAIN", "TEST"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "a", "rejected": "b"}])
    found = prepare_here(make_config(tmp_path, {"path": str(tmp_path)}), tokenizer)
    assert [row["prompt"] for row in found.read().to_pylist()] == ["TRAIN"]


def test_a_conversation_as_python_prints_it(tmp_path: Path, tokenizer: Any) -> None:
    said = str([{"content": "a long text " * 40, "role": "user"}])
    assert "is the text of a conversation" in refused(
        tmp_path, tokenizer, [{"prompt": "q", "chosen": said, "rejected": "b"}], {}
    )


@pytest.mark.parametrize("text", [r"a \ud83d b", r"a \udc00 b", r"\ud800\ud800"])
def test_half_a_character_of_a_json_array(tmp_path: Path, tokenizer: Any, text: str) -> None:
    (tmp_path / "a.json").write_text(f'[{{"prompt": "q one two", "chosen": "{text}", "rejected": "c"}}]')
    with pytest.raises(UserError, match=r"a\.json: .* half a character: '.*ud"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.json")}), tokenizer)


def test_whole_characters_of_a_json_array(tmp_path: Path, tokenizer: Any) -> None:
    text = r"\ud83d\ude00 " * 30_000 + r"\\ud83d"
    (tmp_path / "a.json").write_text(f'[{{"prompt": "q one two", "chosen": "{text}", "rejected": "c"}}]')
    found = prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.json")}, sequence_len=10**6), tokenizer)
    assert found.read()["chosen"].to_pylist() == ["\U0001f600 " * 30_000 + r"\ud83d"]


def test_other_separators_of_csv(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("prompt;chosen;rejected\nq;a;b\n")
    with pytest.raises(UserError, match="the header is one column, 'prompt;chosen;rejected'; separate columns by ',', not"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer)


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path, tokenizer: Any) -> None:
    file = write_jsonl(tmp_path / "a[1].jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    found = prepare_here(make_config(tmp_path, {"path": "json", "data_files": [str(file)], "ds_type": "jsonl"}), tokenizer)
    assert found.train_rows == 1


def test_no_tools_as_text(tmp_path: Path, tokenizer: Any) -> None:
    assert prepared(tmp_path, tokenizer, [{**ASKED, "tools": "[]"}]).train_rows == 1


def test_a_token_that_a_template_wants_and_the_tokenizer_lacks(tmp_path: Path, tokenizer: Any) -> None:
    told = refused(tmp_path, tokenizer, [ASKED], {**CHAT, "chat_template": "llama3"})
    assert "'bos_token' is undefined; the tokenizer has none: give it one (special_tokens.bos_token)" in told


def test_a_prompt_column_that_is_the_rendered_prompt(tmp_path: Path, tokenizer: Any) -> None:
    answers = {name: [USER, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    for prompt in (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
        "<s>[INST] What is 2 + 2? [/INST]",
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>",
        "### Instruction:\nWhat is 2 + 2?\n\n### Response:\n",
        "What is",
    ):
        (tmp_path / "prepared").mkdir(exist_ok=True)
        assert prepared(tmp_path, tokenizer, [{"prompt": prompt, **answers}], {}).train_rows == 1, prompt


def test_shards_may_be_counted_from_one(tmp_path: Path, tokenizer: Any) -> None:
    for number in (1, 2):
        write_jsonl(tmp_path / f"train-{number:05d}-of-00002.jsonl", [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"}])
    write_jsonl(tmp_path / "test-00001-of-00003.jsonl", [{"prompt": "t", "chosen": "a", "rejected": "b"}])  # nobody asks for it
    assert prepare_here(make_config(tmp_path, {"path": str(tmp_path)}), tokenizer).train_rows == 2


def test_empty_columns_of_csv(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,,\nq,a,b,,\n")
    assert prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer).train_rows == 1


def test_a_key_that_stands_twice_is_told(tmp_path: Path, tokenizer: Any) -> None:
    """JSON's parsers take the last one."""
    row = '{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}'
    lines = tmp_path / "a.jsonl"
    lines.write_text(row + "\n" + "\n".join(map(json.dumps, pairs(3))))
    found = prepare_here(make_config(tmp_path, {"path": str(lines)}, max_rejected_fraction=0.5), tokenizer)
    assert "the key 'chosen' stands twice in an object" in found.read("rejected")["reason"][0].as_py()
    array = tmp_path / "b.json"
    array.write_text(f"[{json.dumps(pairs(1)[0])}, {row}]")
    found = prepare_here(make_config(tmp_path, {"path": str(array)}, max_rejected_fraction=0.5), tokenizer)
    assert found.read("rejected")["reason"].to_pylist() == [
        "does not parse as JSON: the key 'chosen' stands twice in an object"
    ]
    assert found.train_rows == 1


def test_tabs_separate_columns_of_tsv(tmp_path: Path, tokenizer: Any) -> None:
    rows = [[row["prompt"], row["chosen"], row["rejected"]] for row in pairs(3)]
    text = "\n".join("\t".join(cells) for cells in [["prompt", "chosen", "rejected"], *rows])
    (tmp_path / "a.tsv").write_text(text)
    prepared = prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.tsv")}), tokenizer)
    assert prepared.read()["prompt"].to_pylist() == [row[0] for row in rows]
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"separate columns by ',', not by '\\t', or call the file \.tsv"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.arrow"])
def test_the_first_bytes_say_what_a_file_is(tmp_path: Path, tokenizer: Any, name: str) -> None:
    """Whatever it is called."""
    pq.write_table(pa.Table.from_pylist(pairs(3)), tmp_path / name)
    assert prepare_here(make_config(tmp_path, {"path": str(tmp_path / name)}), tokenizer).train_rows == 3


def test_json_that_is_called_csv(tmp_path: Path, tokenizer: Any) -> None:
    for name, text in (("a.csv", "\n".join(map(json.dumps, pairs(3)))), ("b.csv", json.dumps(pairs(3), indent=1))):
        (tmp_path / name).write_text(text)
        assert prepare_here(make_config(tmp_path, {"path": str(tmp_path / name)}), tokenizer).train_rows == 3
    (tmp_path / "c.parquet").write_text("prompt,chosen,rejected\n")
    with pytest.raises(UserError, match=r"c\.parquet' is no Parquet, .* PAR1 \(it begins with b'prompt,chosen,re'\)"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "c.parquet")}), tokenizer)


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Looks for a thing.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": 'The "thing" itself.'}}},
    },
}


@pytest.mark.parametrize(("template", "told"), [("{{ tools | tojson }}", 0), ("{{ tools[0].function.name }}", 1)])
def test_descriptions_of_tools_that_are_left_out_are_told(tokenizer: Any, template: str, told: int) -> None:
    chat = (
        f"{{% if tools %}}{template}{{% endif %}}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    transform = load_transform("chat_template.default", tokenizer=tokenizer, chat_template_jinja=chat)
    row = {"messages": [{"role": "user", "content": "hi"}], "chosen": "b", "rejected": "c", "tools": [TOOL]}
    (rendered,) = transform.rows(row)
    found = [note for note in rendered.notes if note.kind == "tools_shortened"]
    assert {note.example for note in found} == ({"Looks for a thing."} if told else set())


def test_white_space_that_a_template_drops_is_told(tokenizer: Any) -> None:
    chat = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": " hi"}], "chosen": "    return 1\n", "rejected": "c\n"}
    for keys, expected in (({"chat_template_jinja": chat}, {"    return 1\n", " hi"}), ({}, set())):
        (rendered,) = load_transform("chat_template.default", tokenizer=tokenizer, **keys).rows(row)
        assert {note.example for note in rendered.notes if note.kind == "trimmed"} == expected


def test_the_sign_of_spelled_tokens_is_no_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a \ufdd0 b", "chosen": "b", "rejected": "c"}, *pairs(3)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    cfg = make_config(tmp_path, {"path": path}, max_rejected_fraction=0.5, encode_special_tokens=False)
    assert prepare_here(cfg, tokenizer).read("rejected")["reason"][0].as_py().startswith("the text holds U+FDD0")
    kept = prepare_here(make_config(tmp_path, {"path": path}), tokenizer)
    assert kept.read()["prompt"][0].as_py() == "a \ufdd0 b"
    assert tokenizer.decode(kept.read()["prompt_ids"][0].as_py()) == "a \ufdd0 b"


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (turn("user", "hi "), "turn 1 (user) of chosen and of rejected is the same but for white space around its text"),
        (turn("user", "hi", id=7), "turn 1 (user) of chosen and of rejected is the same but for its 'id'"),
    ],
)
@pytest.mark.parametrize("kind", [None, "chat_template.argilla_chat"])
def test_what_keeps_two_prompts_from_being_one_is_named(tokenizer: Any, kind: str | None, other: Any, words: str) -> None:
    row = {
        "chosen": [turn("user", "hi"), turn("assistant", "a")],
        "rejected": [other, turn("assistant", "b")],
    }
    with pytest.raises(RowError, match=re.escape(words)):
        load_transform(kind, tokenizer=tokenizer)(row)


def test_a_type_that_takes_the_rows_is_named(tokenizer: Any) -> None:
    row = {name: [turn("user", "hi"), turn("assistant", name)] for name in ("chosen", "rejected")}
    with pytest.raises(RowError, match=r"no column 'messages'; 'chosen' is a conversation: type chat_template\.argilla_chat"):
        load_transform("chat_template.default", tokenizer=tokenizer)({"prompt": "hi", **row})


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PROMPT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"


def rendered(tokenizer: Any, row: dict[str, Any], kind: str | None = "chat_template.default", **keys: Any) -> Any:
    (found,) = load_transform(kind, tokenizer=tokenizer, **keys).rows(row)
    return found


def kinds(found: Any) -> set[str]:
    return {note.kind for note in found.notes}


def test_a_header_that_the_template_writes_unasked_is_the_prompts(tokenizer: Any) -> None:
    found = rendered(tokenizer, ASKED, chat_template_jinja=TURN)
    assert found.prompt == f"{PROMPT}<|im_start|>assistant\n"
    assert found.sequences[0] == f"{found.prompt}It is 4.<|im_end|>"
    assert "opens_nothing" in kinds(found)
    assert "opens_nothing" not in kinds(rendered(tokenizer, ASKED, chat_template_jinja=TURN + OPENING))
    (asked,) = load_transform("chat_template.default", "grpo", tokenizer, chat_template_jinja=TURN).rows(ASKED)
    assert "opens_nothing" in kinds(asked)


@pytest.mark.parametrize("behind", ["<|im_start|>assistant\n", "### END", "<|im_end|>", "</s>"])
def test_what_stands_behind_the_end_of_an_answer_is_cut_off(tokenizer: Any, behind: str) -> None:
    template = f"{TURN}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{behind}{{% endif %}}"
    found = rendered(tokenizer, ASKED, chat_template_jinja=template)
    assert found.sequences[0] == f"{PROMPT}<|im_start|>assistant\nIt is 4.<|im_end|>"
    assert "cut_behind" in kinds(found)


@pytest.mark.parametrize("kind", ["chat_template.default", "chatml.intel"])
def test_an_end_of_another_tokenizer_within_an_answer_is_told(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    row = {**ASKED, "question": "What?", "chosen": "It is 4.</s>"}
    found = prepared(tmp_path, tokenizer, [row], {"type": kind})
    assert any("answers end in '</s>', which the tokenizer reads as text" in note for note in found.notes)


def test_a_prompt_without_spaces_is_seen_in_its_answers(tokenizer: Any) -> None:
    asked = "请写一首关于春天的诗"
    found = rendered(tokenizer, {"prompt": asked, "chosen": f"{asked}好", "rejected": f"{asked}不"}, None)
    assert found.sequences == (f"{asked}好", f"{asked}不")
    short = rendered(tokenizer, {"prompt": "2+2=", "chosen": "2+2=4", "rejected": "2+2=5"}, None)
    assert short.sequences[0] == "2+2=2+2=4" and "answers_echo_prompt" in kinds(short)


@pytest.mark.parametrize(
    ("before", "marker", "again"),
    [
        ("Human: q\nAssistant:", " ", "\nHuman:"),
        ("<|user|>\nq\n<|assistant|>\n", "", "\n<|user|>\n"),
        ("[INST] q [/INST]", " ", " [INST] "),
        ("### Instruction:\nq\n### Response:", "\n", "\n### Instruction:\n"),
    ],
)
def test_where_an_answer_begins_and_that_it_holds_no_turn_of_another(
    tokenizer: Any, before: str, marker: str, again: str
) -> None:
    chosen, rejected = f"{before}{marker}I think so", f"{before}{marker}I think not"
    found = rendered(tokenizer, {"chosen": chosen, "rejected": rejected}, None)
    assert (found.prompt, found.sequences) == (before, (chosen, rejected))
    with pytest.raises(RowError, match="'chosen' holds another turn"):
        rendered(tokenizer, {"chosen": f"{chosen}{again}q2", "rejected": rejected}, None)


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "hi", "image": "x.png"}],
        [{"image_url": {"url": "x.png"}, "text": "hi"}],
        [{"type": "input_image", "image_url": "x"}],
    ],
)
def test_a_part_that_brings_a_picture_is_refused_whatever_its_type(tokenizer: Any, content: Any) -> None:
    with pytest.raises(RowError, match="only text can be trained on"):
        rendered(tokenizer, {**ASKED, "messages": [{"role": "user", "content": content}]})


def test_choices_are_no_turns(tokenizer: Any) -> None:
    asked = "Which is right?\n\nA: red\n\nB: blue\n\nIt is"
    found = rendered(tokenizer, {"chosen": f"{asked} red", "rejected": f"{asked} blue"}, None)
    assert found.prompt == asked
    kept = rendered(tokenizer, {"prompt": asked, "chosen": " Both.\n\nA: red too", "rejected": " no"}, None)
    assert kept.sequences[0].endswith("A: red too")
    talk = "H: q\n\nA: yes\n\nH: really?\n\nA:"
    assert rendered(tokenizer, {"chosen": f"{talk} 42", "rejected": f"{talk} 43"}, None).prompt == talk


def test_tools_have_to_change_the_text(tokenizer: Any) -> None:
    row = {**ASKED, "messages": [{"role": "user", "content": "find it"}], "tools": [TOOL]}
    with pytest.raises(RowError, match="the chat template does not render tools"):
        rendered(tokenizer, row, chat_template_jinja=TURN + OPENING)


@pytest.mark.parametrize("name", ["first", "index", "name"])
def test_a_property_of_messages_that_changes_nothing_is_told(tokenizer: Any, name: str) -> None:
    """Though the template has a word like it."""
    template = (
        "{% for m in messages %}{% if loop.first or loop.index %}{% set name = 1 %}{% endif %}{% endfor %}" + TURN + OPENING
    )
    row = {**ASKED, "messages": [{**USER, name: "Alice"}]}
    assert "not_read" in kinds(rendered(tokenizer, row, chat_template_jinja=template))
    reading = TURN.replace("m.content", f"m.content ~ (m['{name}'] or '')") + OPENING
    assert "not_read" not in kinds(rendered(tokenizer, row, chat_template_jinja=reading))


def test_reasoning_is_text(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "4", "reasoning_content": ["first", "then"]}
    with pytest.raises(RowError, match="'reasoning_content' must be text, got list"):
        rendered(tokenizer, {**ASKED, "chosen": [answer]})


@pytest.mark.parametrize("arguments", ['{"city": "Oslo', '{"city": "Oslo", "city": "Rome"}'])
def test_arguments_that_are_no_object_are_refused(tokenizer: Any, arguments: str) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(RowError, match="arguments of a tool call don't parse as JSON, or have a key twice"):
        rendered(tokenizer, {**ASKED, "chosen": [answer], "tools": [TOOL]}, chat_template="qwen3")


def test_text_that_is_written_as_json_is_told(tokenizer: Any) -> None:
    template = TURN.replace("m.content", "m.content | tojson") + OPENING
    found = rendered(tokenizer, {**ASKED, "chosen": 'He said "hi"\nok'}, chat_template_jinja=template)
    assert "escaped" in kinds(found)


def test_a_lone_quote_in_tsv_swallows_no_row(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.tsv").write_text('prompt\tchosen\trejected\nq\t"Hi there\tb\nq2\tx\ty"\tz\nq3\tx\ty\n')
    found = prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.tsv")}, max_rejected_fraction=0.9), tokenizer)
    assert found.train_rows == 1 and "a quote is open before it" in found.read("rejected")["reason"][0].as_py()


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["prefs.jsonl", "model-eval.jsonl"], None),
        (["train.jsonl", "more.jsonl"], None),
        (["extra-00000-of-00001.jsonl", "prefs.jsonl"], 6),
        (["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"], 6),
        (["train.jsonl", "test.jsonl"], 3),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], 3),
    ],
)
def test_no_file_of_a_folder_is_left_out_unasked(tmp_path: Path, tokenizer: Any, names: list[str], trained: int | None) -> None:
    for number, name in enumerate(names):
        (tmp_path / "ds" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "ds" / name, pairs(6)[3 * number :][:3])
    cfg = make_config(tmp_path, {"path": str(tmp_path / "ds")})
    if trained is None:
        with pytest.raises(UserError, match=r"but for 1 of them, such as (prefs|more)\.jsonl; name the files that are meant"):
            prepare_here(cfg, tokenizer)
    else:
        assert prepare_here(cfg, tokenizer).train_rows == trained


def test_prompts_of_both_sides_are_told(tmp_path: Path, tokenizer: Any) -> None:
    train, test = (str(write_jsonl(tmp_path / f"{name}.jsonl", pairs(n))) for name, n in (("train", 4), ("test", 2)))
    cfg = make_config(tmp_path, {"path": train}, test_datasets=[{"path": test}])
    assert any(
        "2 rows: evaluation rows have a prompt that training rows have too" in note
        for note in prepare_here(cfg, tokenizer).notes
    )


def test_a_column_that_may_say_which_answer_is_better_is_told(tokenizer: Any) -> None:
    for name in ("overall_preference", "labels", "better_response_id", "score_0"):
        assert "may_be_the_label" in kinds(rendered(tokenizer, {**ASKED, name: 1}))
    assert "may_be_the_label" not in kinds(rendered(tokenizer, {**ASKED, "score_chosen": 1}))


def test_long_words_take_no_time(tokenizer: Any) -> None:
    """A search backwards from the end would take minutes."""
    word = "a" * 1_000_000
    assert rendered(tokenizer, {"chosen": f"so {word}b", "rejected": f"so {word}c"}, None).prompt == "so"
    blanks = f"so{' ' * 1_000_000}"
    assert rendered(tokenizer, {"chosen": f"{blanks}b", "rejected": f"{blanks}."}, None).prompt == "so"


def test_an_answer_that_is_a_message_as_json_is_told(tmp_path: Path, tokenizer: Any) -> None:
    as_message = json.dumps({"role": "assistant", "content": "It is 4."})
    found = prepared(tmp_path, tokenizer, [{**ASKED, "chosen": as_message}])
    assert "the column 'chosen' holds the JSON text of one message, which was read as that" in "\n".join(found.notes)
    assert found.read().to_pylist()[0]["chosen"].startswith("It is 4.")
    meant = [{"role": "assistant", "content": as_message}]
    found = prepared(tmp_path, tokenizer, [{**ASKED, "chosen": meant}])
    assert not found.notes and found.read().to_pylist()[0]["chosen"].startswith(as_message)


@pytest.mark.parametrize(
    "answer", [{"name": "Ada", "role": "user"}, [{"from": "user", "to": "admin"}], {"a": {"role": "tool"}}]
)
def test_an_answer_in_json_that_names_roles_is_an_answer(tmp_path: Path, tokenizer: Any, answer: Any) -> None:
    row = {**ASKED, "chosen": json.dumps(answer)}
    found = prepared(tmp_path, tokenizer, [row])
    assert not found.notes and found.read().to_pylist()[0]["chosen"].startswith(row["chosen"])


@pytest.mark.parametrize("of", ["{'messages': %s}", '{"messages": %s}', '{"a": [{"b": %s}]}'])
def test_a_conversation_within_an_answer_is_refused(tmp_path: Path, tokenizer: Any, of: str) -> None:
    said = refused(tmp_path, tokenizer, [{**ASKED, "chosen": of % json.dumps([USER])}])
    assert "'chosen' is the text of a conversation, not an answer" in said and "in a form that isn't read" in said


def test_a_prompt_that_is_taken_from_where_texts_part_is_told(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is green."}]
    assert "no headers of turns, and the prompt is taken to end where the answers part" in "\n".join(
        prepared(tmp_path, tokenizer, rows, {}).notes
    )
    talk = {name: f"\n\nHuman: Why?\n\nAssistant: {said}" for name, said in (("chosen", "So."), ("rejected", "No."))}
    assert not prepared(tmp_path, tokenizer, [talk], {}).notes


def test_the_numbers_that_pandas_gives_rows_are_no_column(tmp_path: Path, tokenizer: Any) -> None:
    pd.DataFrame([{"prompt": "Q", "chosen": "a", "rejected": "b"}] * 2).to_csv(tmp_path / "a.csv")
    assert not prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.csv")}), tokenizer).notes


DIALOGUES = {
    "choices behind a question": ("Q: pick one\n\nA: red\n\nB: blue\n\nAnswer: ", None),
    "one line each": ("Q: Why?\nA:", " So.\nQ: And?\nA: No."),
    "a bot": ("User: Why?\nBot:", " So.\nUser: And?\nBot: No."),
    "Vicuna": ("USER: Why? ASSISTANT:", " So.</s>USER: And? ASSISTANT: No."),
    "OASST": ("<|prompter|>Why?<|endoftext|><|assistant|>", "So.<|endoftext|><|prompter|>And?<|endoftext|><|assistant|>No."),
    "Cohere": (
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Why?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "So.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>And?",
    ),
    "DeepSeek": ("<｜User｜>Why?<｜Assistant｜>", "So.<｜end▁of▁sentence｜><｜User｜>And?<｜Assistant｜>No."),
}
"""A prompt as text, and an answer that holds another turn; None where there is none."""


@pytest.mark.parametrize("name", list(DIALOGUES))
def test_other_turns_of_a_dialogue_are_no_answer(tmp_path: Path, tokenizer: Any, name: str) -> None:
    prompt, several = DIALOGUES[name]
    whole = {"chosen": f"{prompt}yes", "rejected": f"{prompt}no"}
    row = prepared(tmp_path, tokenizer, [whole], {}).read().to_pylist()[0]
    assert (row["prompt"].strip(), row["chosen"].strip()) == (prompt.strip(), "yes")
    if several is not None:
        for given in ({"prompt": prompt, "chosen": several, "rejected": "no"}, {**whole, "chosen": prompt + several}):
            assert "holds another turn" in refused(tmp_path, tokenizer, [given], {})


@pytest.mark.parametrize("type_", ["zephyr.nectar", "chatml.prompt_pairs"])
def test_another_turn_of_the_dialogue_that_a_type_reads(type_: str) -> None:
    prompt, said = "\n\nHuman: Hi there\n\nAssistant: ", "4\n\nHuman: next\n\nAssistant: ok"
    ranked = [{"answer": said, "rank": 1}, {"answer": "no", "rank": 2}]
    with pytest.raises(RowError, match=r"holds another turn \('Human:'\)"):
        load_transform(type_)({"prompt": prompt, "chosen": said, "rejected": "no", "answers": ranked})


@pytest.mark.parametrize("keys", [CHAT, {}])
def test_two_turns_of_the_assistant_are_no_answer(tmp_path: Path, tokenizer: Any, keys: dict[str, Any]) -> None:
    twice = [{"role": "assistant", "content": text} for text in ("x", "y")]
    row = {"messages": [USER], "prompt": [USER], "chosen": twice, "rejected": twice[:1]}
    said = refused(tmp_path, tokenizer, [{name: row[name] for name in row if keys or name != "messages"}], keys)
    assert "'chosen' has two turns of the assistant one after the other, and an answer ends once" in said


@pytest.mark.parametrize(("arguments", "rendered"), [("", "{}"), ("  ", "{}"), ("a=1", None), ("5 dollars", None)])
def test_arguments_of_calls_that_are_no_json(tmp_path: Path, tokenizer: Any, arguments: str, rendered: str | None) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get", "arguments": arguments}}]}
    row, dataset = {**ASKED, "chosen": call}, {**CHAT, "chat_template": "qwen3"}
    if rendered is None:
        assert "arguments of a tool call don't parse as JSON" in refused(tmp_path, tokenizer, [row], dataset)
    else:
        assert f'"arguments": {rendered}' in prepared(tmp_path, tokenizer, [row], dataset).read().to_pylist()[0]["chosen"]


def test_reasoning_that_never_ends_is_told(tmp_path: Path, tokenizer: Any) -> None:
    row = {**ASKED, "rejected": "<think>hmm never ends"}
    told = "\n".join(prepared(tmp_path, tokenizer, [row], {**CHAT, "chat_template": "qwen3"}).notes)
    assert "1 row: answers open `<think>` and never close it" in told


def test_an_argument_that_the_template_does_not_read_is_told(tmp_path: Path, tokenizer: Any) -> None:
    turns = {name: [USER, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    row = {**turns, "chat_template_kwargs": {"enable_thnking": False}}
    told = "\n".join(prepared(tmp_path, tokenizer, [row], {}).notes)
    assert "chat_template_kwargs has 'enable_thnking', which the chat template doesn't read" in told


def test_a_prompt_that_holds_the_answer_already(tmp_path: Path, tokenizer: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "It is 4."}]
    row = {"prompt": USER["content"], "messages": turns, "chosen": turns, "rejected": [USER, {**turns[1], "content": "No."}]}
    assert "whose messages hold the answer already; take the prompt from another column" in refused(tmp_path, tokenizer, [row])
    found = prepared(tmp_path, tokenizer, [row], {"type": "chat_template.argilla_chat"})
    assert not [note for note in found.notes if "'prompt'" in note]


def test_an_end_of_the_template_is_told_once(tmp_path: Path, tokenizer: Any) -> None:
    (note,) = prepared(tmp_path, tokenizer, [ASKED], {**CHAT, "chat_template": "phi_35"}).notes
    assert "the chat template writes '<|end|>' before the end of an answer, and the tokenizer reads it as text" in note


def test_a_value_nested_too_deep_rejects_its_row(tmp_path: Path, tokenizer: Any) -> None:
    deep = "[" * 1200 + "]" * 1200
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "Q", "chosen": "a", "rejected": "b", "extra": {deep}}}\n')
    with pytest.raises(UserError, match="row 1: a value is nested too deep|row 1: .*nest|recursion"):
        prepare_here(make_config(tmp_path, {"path": str(tmp_path / "a.jsonl")}, max_rejected_fraction=0.0), tokenizer)
