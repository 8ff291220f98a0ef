"""Prompts from the user: typed, or in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from strategies.media import MEDIA, media_in

__all__ = ["check_lengths", "check_prompt", "read_prompts", "shown", "token_ids"]

Given = str | list[dict[str, Any]]
"""Text, or messages."""
SHAPES = 'text, a list of messages, {"prompt": text or messages}, or {"messages": [...]}'
ROLES = ("system", "developer", "user", "assistant", "tool")


def read_prompts(path: str | Path) -> list[Given]:
    """Read the prompts of a file: one per line of text or JSON lines, or a JSON list.

    Raises:
        UserError: for an unreadable or empty file, and for an invalid prompt, with its line.
    """
    file = Path(os.path.expanduser(path))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no text ({error})"
        raise UserError(f"--file: {str(path)!r} can't be read: {why}") from error
    prompts = [check_prompt(value, f"--file: {path}, {location}") for value, location in _parse_values(text, file)]
    if not prompts:
        raise UserError(f"--file: {str(path)!r} has no prompts in it")
    return prompts


def _parse_values(text: str, file: Path) -> Iterator[tuple[Any, str]]:
    if file.suffix == ".json":
        values = _parse(text, f"--file: {file}")
        if not isinstance(values, list):
            raise UserError(f"--file: {file}: expected a list of prompts, got {type(values).__name__}")
        yield from ((value, f"entry {number}") for number, value in enumerate(values, start=1))
        return
    # Blank lines are counted, so that the number in a message is the file's.
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            location = f"line {number}"
            yield _parse(line, f"--file: {file}, {location}") if file.suffix in (".jsonl", ".ndjson") else line, location


def _parse(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{location}: not JSON: {error}") from error


def check_prompt(value: Any, location: str) -> Given:
    """Return the prompt in a value of any of `SHAPES`.

    Raises:
        UserError: for a value of another shape.
    """
    prompt = value.get("prompt", value.get("messages")) if isinstance(value, dict) else value
    if has_media(value) or has_media(prompt):
        raise UserError(
            f"{location}: has pictures or other media, and prompts of `generate` are text alone; `prefray evaluate --data` "
            "answers prompts with their pictures"
        )
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        # The generation prompt would open a second answer behind the one that is there.
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{location}: the last message is the assistant's, so there is nothing to answer; leave it out")
        return prompt
    raise UserError(f"{location}: expected {SHAPES}, got {_shown(value)}")


def has_media(value: Any) -> bool:
    """Return whether a prompt's row, or a list of messages, has pictures or other media beside or among its text."""
    if isinstance(value, dict):
        return any(True for _ in media_in(value)) or has_media(value.get("content"))
    if isinstance(value, list):
        return any(isinstance(part, dict) and (part.get("type") in MEDIA or has_media(part)) for part in value)
    return False


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shown(prompt: Given) -> str:
    """Return a prompt's text to display: the last message, with the number of those before it."""
    if isinstance(prompt, str):
        return prompt
    before = f"({len(prompt) - 1} before) " if len(prompt) > 1 else ""
    return f"{before}{prompt[-1]['content']}"


def token_ids(prompts: Iterable[Given], tokenizer: Any, raw: bool = False) -> list[list[int]]:
    """Tokenize prompts for generation.

    Text becomes a user message if the tokenizer has a chat template; with `raw` it is continued as it is.

    Raises:
        UserError: for messages without a chat template, and for those that the template refuses.
    """
    from jinja2 import TemplateError

    token_lists = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            token_lists.append(_ids(prompt, tokenizer, raw))
        except TemplateError as error:
            raise UserError(f"prompt {number}: the chat template doesn't render it: {error}") from error
    return token_lists


def check_lengths(ids: Sequence[Sequence[int]], new_tokens: int, positions: int) -> None:
    """Check that prompts with their answers fit the learned positions of a model.

    Raises:
        UserError: for the first one that doesn't.
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
            # With special tokens: plain text gets the tokenizer's BOS, which a chat template writes itself.
            return tokenizer(prompt)["input_ids"]
        prompt = [{"role": "user", "content": prompt}]
    if tokenizer.chat_template is None:
        raise UserError("chat_template: the tokenizer has none to render messages with; set one (--set chat_template=chatml)")
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
