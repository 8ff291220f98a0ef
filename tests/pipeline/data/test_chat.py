"""`chat_template.*`: names of roles and properties, shapes of answers, tools, thinking."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.data import load_transform
from pipeline.data.transforms import RowError
from pipeline.errors import UserError

TEMPLATES = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations))) / "chat_templates"
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text()
USER = {"role": "user", "content": "Q"}
PROMPT = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def said(text, role="assistant"):
    return {"role": role, "content": text}


@pytest.fixture
def transform(tokenizer):
    def make(rl="dpo", type="chat_template.default", **keys):
        return load_transform(type, rl=rl, tokenizer=tokenizer, **keys)

    return make


@pytest.mark.parametrize("wrap", [lambda t: t, said, lambda t: [said(t)], lambda t: [USER, said(t)]])
def test_shapes_of_answers(transform, wrap):
    """Text, a message, messages, messages that repeat the prompt. What follows the last `<|im_end|>` is stripped."""
    row = {"messages": [USER], "chosen": wrap("C"), "rejected": wrap("R")}
    assert transform()(row) == {"prompt": PROMPT, "chosen": "C<|im_end|>", "rejected": "R<|im_end|>"}


def test_a_prompt_may_be_text(transform):
    assert transform()({"messages": "Q", "chosen": "C", "rejected": "R"})["prompt"] == PROMPT


def test_cells_of_a_csv(transform):
    row = {
        "messages": '[{"role": "user", "content": "Q"}]',
        "chosen": '{"role": "assistant", "content": "C"}',
        "rejected": '{"a": 1}',
    }
    assert transform()(row) == {"prompt": PROMPT, "chosen": "C<|im_end|>", "rejected": '{"a": 1}<|im_end|>'}


def test_names_of_roles_properties_and_fields(transform):
    mapped = transform(
        roles={"user": ["person"], "assistant": "bot"},
        message_property_mappings={"role": "from", "content": "value"},
        field_messages="conversations",
        field_chosen="good",
        field_rejected="bad",
    )
    row = {
        "conversations": [{"from": "person", "value": "Q"}],
        "good": {"from": "bot", "value": "C"},
        "bad": {"from": "gpt", "value": "R"},
    }
    assert mapped(row) == {"prompt": PROMPT, "chosen": "C<|im_end|>", "rejected": "R<|im_end|>"}
    older = transform(message_field_role="from", message_field_content="value", field_messages="conversations")
    row = {"conversations": row["conversations"], "chosen": "C", "rejected": "R"}
    with pytest.raises(RowError, match=r"conversations\[0\]: unknown role 'person' \(known: assistant, .*name it in roles"):
        older(row)
    row["conversations"][0]["from"] = "human"
    assert older(row)["prompt"] == PROMPT


def test_drop_system_message(transform):
    row = {"messages": [said("S", "system"), USER], "chosen": "C", "rejected": "R"}
    assert transform()(row)["prompt"] == "<|im_start|>system\nS<|im_end|>\n" + PROMPT
    assert transform(drop_system_message=True)(row)["prompt"] == PROMPT


def test_several_turns_are_kept(transform):
    turns = [USER, said("A"), said("Q2", "user")]
    row = {"messages": turns, "chosen": [*turns, said("C")], "rejected": said("R")}
    result = transform()(row)
    assert result["prompt"] == PROMPT + "A<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    assert (result["chosen"], result["rejected"]) == ("C<|im_end|>", "R<|im_end|>")


@pytest.mark.parametrize("type", ["chat_template.argilla_chat", "chat_template.argilla"])
def test_argilla_chat(transform, type):
    row = {
        "chosen": [USER, said("A"), said("Q2", "user"), said("C")],
        "rejected": [USER, said("A"), said("Q2", "user"), said("R")],
    }
    result = transform(type=type)(row)
    assert result["prompt"] == PROMPT + "A<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    assert (result["chosen"], result["rejected"]) == ("C<|im_end|>", "R<|im_end|>")
    with pytest.raises(RowError, match="answer different prompts"):
        transform(type=type)({"chosen": [USER, said("C")], "rejected": [said("Other", "user"), said("R")]})


def test_argilla_takes_prompt_and_system_from_columns(transform):
    row = {"system": "S", "prompt": "Q", "chosen": [said("C")], "rejected": [said("R")]}
    result = transform(type="chat_template.argilla")(row)
    assert result["prompt"] == "<|im_start|>system\nS<|im_end|>\n" + PROMPT


def test_tool_calls_are_rendered(transform):
    """Axolotl fails on `content: null` and drops the calls."""
    row = {
        "messages": [USER],
        "tools": TOOLS,
        "chosen": [CALL, said("4 C", "tool"), said("Cold.")],
        "rejected": said("No idea."),
    }
    result = transform(chat_template_jinja=QWEN3)(row)
    assert '{"type": "function", "function": {"name": "weather", "parameters": {}}}' in result["prompt"]
    assert result["prompt"].endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
    answer = "<|im_start|>user\n<tool_response>\n4 C\n</tool_response><|im_end|>\n"
    answer += "<|im_start|>assistant\n<think>\n\n</think>\n\nCold.<|im_end|>"
    assert result["chosen"] == call + answer
    assert result["rejected"] == "<think>\n\n</think>\n\nNo idea.<|im_end|>"


def test_field_tools_as_json_text(transform):
    row = {"messages": [USER], "functions": '[{"name": "weather"}]', "chosen": "C", "rejected": "R"}
    assert '{"name": "weather"}' in transform(chat_template_jinja=QWEN3, field_tools="functions")(row)["prompt"]


@pytest.mark.parametrize(("extra", "what"), [({"chosen": CALL}, "tool_calls"), ({"tools": TOOLS}, "tools")])
def test_a_template_that_would_drop_tools_is_refused(transform, extra, what):
    with pytest.raises(RowError, match=rf"does not render {what} \('weather' is missing\)"):
        transform()({"messages": [USER], "chosen": "C", "rejected": "R", **extra})


def test_thinking_is_neither_doubled_nor_cut(transform):
    """Axolotl makes `<think>\\nr` follow a prompt that ends in `<think>`, and breaks plain answers."""
    row = {"messages": [USER], "chosen": "<think>\nr\n</think>\n\nC", "rejected": "R"}
    assert transform(chat_template="qwen3")(row) == {
        "prompt": PROMPT,
        "chosen": "<think>\nr\n</think>\n\nC<|im_end|>",
        "rejected": "<think>\n\n</think>\n\nR<|im_end|>",
    }


def test_a_generation_prompt_that_opens_think(transform):
    opening = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")
    assert opening != QWEN3
    row = {"messages": [USER], "chosen": "<think>\nr\n</think>\n\nC", "rejected": "R"}
    result = transform(chat_template_jinja=opening)(row)
    assert result["prompt"] == PROMPT + "<think>\n"
    assert result["chosen"] == "r\n</think>\n\nC<|im_end|>"
    assert result["rejected"] == "\n</think>\n\nR<|im_end|>"


def test_reasoning_content_under_another_name(transform):
    row = {"messages": [USER], "chosen": {**said("C"), "thoughts": "r"}, "rejected": "R"}
    mapped = transform(chat_template="qwen3", message_property_mappings={"reasoning_content": "thoughts"})
    assert "<think>\nr\n</think>\n\nC<|im_end|>" in mapped(row)["prompt"] + mapped(row)["chosen"]


def test_kto(transform):
    row = {"messages": [USER, said("A")], "label": 0}
    expected = {"prompt": PROMPT, "completion": "A<|im_end|>", "label": False}
    assert transform(rl="kto")(row) == expected
    assert transform(rl="kto")({"messages": [USER], "completion": "A", "label": 0}) == expected
    assert transform(rl="kto", type="chat_template.argilla_chat")({"completion": row["messages"], "label": 0}) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "C", "rejected": "R"}, r"no column 'messages' \(the row has chosen, rejected\)"),
        ({"messages": [{"from": "human"}], "chosen": "C", "rejected": "R"}, r"messages\[0\] has no 'role' \(it has from\)"),
        ({"messages": [{"role": "user"}], "chosen": "C", "rejected": "R"}, r"messages\[0\] has no 'content'"),
        ({"messages": [USER], "chosen": "", "rejected": "R"}, "'chosen' is empty"),
        ({"messages": [USER], "chosen": "C", "rejected": [USER]}, "'rejected' is empty"),
        ({"messages": [USER], "chosen": "C", "rejected": "C"}, "chosen and rejected are the same"),
        ({"messages": [], "chosen": "C", "rejected": "R"}, "the prompt is empty"),
        ({"messages": 3, "chosen": "C", "rejected": "R"}, "'messages' must be messages, got int"),
        ({"messages": [USER], "chosen": said(5), "rejected": "R"}, r"chosen\[0\].content must be text, got int"),
    ],
)
def test_bad_rows(transform, row, reason):
    with pytest.raises(RowError, match=reason):
        transform()(row)


def test_what_the_template_refuses_is_the_rows_fault(transform):
    refusing = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(RowError, match="does not take this conversation: turns must alternate"):
        transform(chat_template_jinja=refusing)({"messages": [USER], "chosen": "C", "rejected": "R"})


def test_a_tokenizer_without_a_template():
    from tests.tiny import tiny_tokenizer

    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(
        UserError, match="the tokenizer has no chat template, and the data are conversations; set chat_template"
    ):
        load_transform("chat_template.default", tokenizer=bare)
    with pytest.raises(UserError, match="chat_template: unknown template 'nope'; built in: chatml"):
        load_transform("chat_template.default", tokenizer=bare, chat_template="nope")
    assert load_transform("chat_template.default", tokenizer=bare, chat_template="chatml").name == "chat_template.default"
    with pytest.raises(UserError, match="needs one; got None"):
        load_transform("chat_template.default")
