"""Prompts in files, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.encode_prompts import EncodedPrompt, PromptEncoder
from pipeline.evaluation.prompts import check_prompt, read_prompts
from tests.tiny import tiny_tokenizer

MESSAGES: list[Any] = [{"role": "user", "content": "Why?"}]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def contents(path: Path) -> list[Any]:
    return [given.content for given in read_prompts(path)]


def test_lines_of_text(tmp_path: Path) -> None:
    assert contents(write(tmp_path, "prompts.txt", "Why?\n\n  \nHow {not} JSON?\n")) == ["Why?", "How {not} JSON?"]


def test_json_lines_of_every_shape(tmp_path: Path) -> None:
    lines = '"Why?"\n[{"role": "user", "content": "Why?"}]\n{"prompt": "Why?", "chosen": "x"}\n'
    lines += '{"prompt": [{"role": "user", "content": "Why?"}]}\n{"messages": [{"role": "user", "content": "Why?"}]}\n'
    assert contents(write(tmp_path, "p.jsonl", lines)) == ["Why?", MESSAGES, "Why?", MESSAGES, MESSAGES]


@pytest.mark.parametrize("character", ["\u2028", "\x0c", "\x85"])
def test_only_a_newline_ends_a_line(tmp_path: Path, character: str) -> None:
    """And a byte order mark belongs to no prompt."""
    text = f"Why{character}not?"
    assert contents(write(tmp_path, "p.txt", f"\ufeff{text}\r\nHow?")) == [text, "How?"]
    assert contents(write(tmp_path, "p.jsonl", f"\ufeff{json.dumps(text, ensure_ascii=False)}\n")) == [text]


def test_a_json_list(tmp_path: Path) -> None:
    assert contents(write(tmp_path, "p.json", '["Why?", {"prompt": "How?"}]')) == ["Why?", "How?"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '"Why?"\n7\n', r"--file: .*p.jsonl, line 2: expected text, a list of messages, .* got 7$"),
        ("p.jsonl", '{"question": "Why?"}\n', r'line 1: expected text, .* got \{"question": "Why\?"\}$'),
        ("p.jsonl", '[{"role": "user", "text": "Why?"}]\n', "line 1: expected text, .* got "),
        ("p.jsonl", '[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]\n', "is the assistant's"),
        ("p.jsonl", "Why?\n", "line 1: not JSON"),
        ("p.json", '{"prompt": "Why?"}', "expected a list of prompts, got dict"),
        ("p.json", "[" * 100_000, "not JSON: maximum recursion depth"),
        ("p.txt", "\n\n", "has no prompts in it"),
    ],
)
def test_a_wrong_shape_is_said_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_a_file_that_cant_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--file: .*no.txt' can't be read: No such file"):
        read_prompts(tmp_path / "no.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is no text"):
        read_prompts(tmp_path / "p.txt")


def encoded(given: Any, tokenizer: Any, raw: bool = False) -> EncodedPrompt:
    return PromptEncoder(tokenizer, raw=raw).encode([check_prompt(given, "prompt 1")])[0]


def test_text_becomes_a_users_message() -> None:
    tokenizer: Any = tiny_tokenizer()
    as_text, parts = encoded("Why?", tokenizer), [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert as_text == encoded(MESSAGES, tokenizer) == encoded(parts, tokenizer)
    assert tokenizer.decode(as_text.ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(encoded("Why?", tokenizer, raw=True).ids) == "Why?"
    tokenizer.chat_template = None
    assert tokenizer.decode(encoded("Why?", tokenizer).ids) == "Why?"
    with pytest.raises(UserError, match="prompt 1: chat_template: the tokenizer has none to render messages with"):
        encoded(MESSAGES, tokenizer)


def test_a_conversation_that_the_template_refuses() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="prompt 1: the chat template doesn't render it: roles must alternate"):
        encoded(MESSAGES, tokenizer)


def test_a_conversation_is_shown_by_its_last_message() -> None:
    tokenizer = tiny_tokenizer()
    assert encoded("Why?", tokenizer).shown == encoded(MESSAGES, tokenizer).shown == "Why?"
    assert encoded([{"role": "system", "content": "Be brief."}, *MESSAGES], tokenizer).shown == "(1 before) Why?"
