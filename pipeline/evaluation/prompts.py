"""Prompts as a person gives them: typed, or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

__all__ = ["check_lengths", "check_prompt", "read_prompts", "shown", "token_ids"]

Given = str | list[dict[str, Any]]
"""Text, or messages."""
SHAPES = 'text, a list of messages, {"prompt": text or messages}, or {"messages": [...]}'
ROLES = ("system", "developer", "user", "assistant", "tool")


def read_prompts(path: str | Path) -> list[Given]:
    """The prompts of a file: one per line of text, or of JSON lines, or a JSON list.

    Raises:
        UserError: for a file that can't be read or has none, and for a prompt of another shape, with its line.
    """
    file = Path(os.path.expanduser(path))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no text ({error})"
        raise UserError(f"--file: {str(path)!r} can't be read: {why}") from error
    prompts = [check_prompt(value, f"--file: {path}, {where}") for value, where in _values(text, file)]
    if not prompts:
        raise UserError(f"--file: {str(path)!r} has no prompts in it")
    return prompts


def _values(text: str, file: Path) -> Iterator[tuple[Any, str]]:
    if file.suffix == ".json":
        values = _parsed(text, f"--file: {file}")
        if not isinstance(values, list):
            raise UserError(f"--file: {file}: expected a list of prompts, got {type(values).__name__}")
        yield from ((value, f"entry {number}") for number, value in enumerate(values, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"line {number}"
            yield _parsed(line, f"--file: {file}, {where}") if file.suffix in (".jsonl", ".ndjson") else line, where


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error


def check_prompt(value: Any, where: str) -> Given:
    """A prompt out of what is given.

    Raises:
        UserError: for another shape.
    """
    prompt = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(one) for one in prompt):
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{where}: the last message is the assistant's, so there is nothing to answer; leave it out")
        return prompt
    raise UserError(f"{where}: expected {SHAPES}, got {_shown(value)}")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown(prompt: Given) -> str:
    """For a person: the last message of a conversation, with the number of those before it."""
    if isinstance(prompt, str):
        return prompt
    before = f"({len(prompt) - 1} before) " if len(prompt) > 1 else ""
    return f"{before}{prompt[-1]['content']}"


def token_ids(prompts: Iterable[Given], tokenizer: Any, raw: bool = False) -> list[list[int]]:
    """Token ids of prompts, ready to be answered.

    Text becomes a user's message where the tokenizer has a chat template; with `raw` it is continued as it stands.

    Raises:
        UserError: for messages without a chat template, and for those that it refuses.
    """
    from jinja2 import TemplateError

    found = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            found.append(_ids(prompt, tokenizer, raw))
        except TemplateError as error:
            raise UserError(f"prompt {number}: the chat template doesn't render it: {error}") from error
    return found


def check_lengths(ids: Sequence[Sequence[int]], new_tokens: int, positions: int) -> None:
    """Refuse prompts whose answers would go beyond the positions that a model has learned.

    Raises:
        UserError: for the first of them.
    """
    for number, prompt in enumerate(ids, start=1):
        if len(prompt) + new_tokens > positions:
            raise UserError(
                f"prompt {number}: {len(prompt)} tokens and an answer of {new_tokens} are more than the {positions} positions "
                "of the model; shorten it, or allow fewer new tokens"
            )


def _ids(prompt: Given, tokenizer: Any, raw: bool) -> list[int]:
    if isinstance(prompt, str):
        if raw or tokenizer.chat_template is None:
            return tokenizer(prompt)["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        raise UserError("chat_template: the tokenizer has none to render messages with; set one (--set chat_template=chatml)")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
