"""The normal form of a row of messages, before a template renders it.

Every dataset type whose rows are messages, or are converted to messages, builds a `Conversation`, and nothing else is rendered,
so the same checks apply to the answers of all types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Row, RowError, optional_text
from pipeline.data.transforms.marks import MARK
from pipeline.data.transforms.messages import ASSISTANT, MessageReader, Messages

__all__ = [
    "Conversation",
    "after_prompt",
    "answer_start",
    "check_prompt",
    "conversation",
    "is_contained_in",
    "is_distinctive",
    "with_system",
]

FEW_WORDS, FEW_CHARACTERS = 3, 6
"""A prompt of fewer words on one line may begin an answer by chance: an answer to "Hi" may well begin so. In scripts without
spaces between words one character is often a word."""
UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")


SPEAKER = re.compile(
    r"[\W_]*(?:(?:system|user|human|assistant|gpt|bot|model|ai|h|a|q|question|answer|instruction|response|inst|sys|s|bos|eos"
    r"|im|start|end|of|turn|header|id|eot|eom|begin|text|endoftext)(?![^\W_])[\W_]*)*",
    re.IGNORECASE,
)
"""Headers and tokens between the turns of a conversation in one text."""


@dataclass(frozen=True)
class Conversation:
    """A prompt, and the answers to it by their column: two of a pair, or one with a label.

    Messages have `role` and `content` (text), and any other properties of the row. An answer holds turns of the assistant, and
    of tools between them.
    """

    prompt: Messages
    answers: Mapping[str, Messages]
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @property
    def whole(self) -> list[Messages]:
        """Prompt and answer, concatenated, for each answer."""
        return [self.prompt + messages for messages in self.answers.values()]


def conversation(
    prompt: Messages,
    answers: Mapping[str, Messages],
    label: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Conversation:
    """Build a conversation from checked parts; a prompt that answers repeat is removed from them.

    Raises:
        RowError: for an empty prompt, an answer without text or with turns of another role, equal answers.
    """
    check_prompt(prompt)
    notes: list[Note] = []
    if prompt[-1]["role"] == "assistant":
        notes.append(Note("answer_after_answer", example=_last_content(prompt)))
    answer_turns = {}
    for name, messages in answers.items():
        # Exact turns only: an answer may begin with words of the question.
        answer_turns[name] = after_prompt(messages, prompt)
        # Before `_check_answer`, whose message would only be that the answer is empty.
        if messages and not answer_turns[name] and prompt[-1]["role"] == "assistant":
            raise RowError(
                f"{name!r} says no more than the prompt does, whose messages hold the answer already; take the prompt from "
                "another column, or choose a type that reads whole conversations, such as chat_template.argilla_chat"
            )
        if len(answer_turns[name]) < len(messages):
            notes.append(Note("prompt_repeated", example=_last_content(messages)))
        _check_answer(answer_turns[name], name)
        if any(message["role"] == "tool" for message in answer_turns[name]):
            notes.append(Note("tool_results", example=_last_content(answer_turns[name])))
    first, *others = answer_turns.values()
    if others and all(messages == first for messages in others):
        raise RowError("chosen and rejected are the same")
    question = _last_content(prompt)
    if question.strip() and all(messages[0]["content"].startswith(question) for messages in answer_turns.values()):
        notes.append(Note("answers_echo_prompt", example=question))
    return Conversation(prompt, answer_turns, label, tools, template_kwargs or {}, tuple(notes))


def check_prompt(prompt: Messages) -> None:
    """Raise RowError for a prompt without turns, or with an empty one of the user."""
    if not prompt:
        raise RowError("the prompt is empty")
    for index, message in enumerate(prompt):
        if message["role"] == "user" and not message["content"].strip():
            raise RowError(f"turn {index + 1} of the prompt, of the user, is empty")


def after_prompt(messages: Messages, prompt: Messages) -> Messages:
    """Return the turns after `prompt` if the messages repeat it, with its system turn or without; else all of them."""
    without_system = prompt[1:] if prompt and prompt[0]["role"] in ("system", "developer") else prompt
    # `with_system` may have added a system turn to the prompt that the answers lack.
    for prefix in (prompt, without_system):
        if prefix and messages[: len(prefix)] == prefix:
            return messages[len(prefix) :]
    return messages


def answer_start(messages: Messages) -> int:
    """Return the index of the last answer's first message: a run of assistant and tool turns at the end."""
    start = len(messages)
    while start and messages[start - 1]["role"] in ASSISTANT:
        start -= 1
    return start


def is_distinctive(text: str) -> bool:
    """Return whether a text is too long to be the beginning of another by chance."""
    return "\n" in text or len(text.split()) >= FEW_WORDS or len(UNSPACED.findall(text)) >= FEW_CHARACTERS


def is_contained_in(question: str, turns: Messages) -> bool:
    """Return whether turns contain the text of another column: as one turn, as a part of one, or all of them as one text.

    A part has at least a few words; a text of all turns has only the names of speakers between them.
    """
    # A picture may stand in the turns alone.
    question = MARK.sub("", question)
    turns = [{**turn, "content": MARK.sub("", turn["content"])} for turn in turns]
    text = question.strip()
    is_short = not is_distinctive(text)
    if any(
        text == turn["content"].strip()
        or (len(text) >= FEW_CHARACTERS and turn["content"].startswith(text))
        or (not is_short and text in turn["content"])
        for turn in turns
    ):
        return True
    # The column may be the whole conversation rendered as text: remove its turns in order, and check what is left.
    rest, cursor = [], 0
    for turn in turns:
        content = turn["content"].strip()
        if (at := question.find(content, cursor)) < 0:
            return False
        rest.append(question[cursor:at])
        cursor = at + len(content)
    return bool(turns) and all(SPEAKER.fullmatch(part) for part in (*rest, question[cursor:]))


def with_system(messages: Messages, row: Row, reader: MessageReader) -> Messages:
    """Prepend the row's `system` to messages without a system turn. Raises RowError where both exist and differ."""
    system = optional_text(row, "system")
    # `drop_system_message` concerns the column as well as the turns.
    if not system.strip() or reader.drop_system_message:
        return messages
    existing = next((message["content"] for message in messages if message["role"] in ("system", "developer")), None)
    if existing is None:
        return [{"role": "system", "content": system}, *messages]
    if existing.strip() != system.strip():
        raise RowError("the column 'system' and the system turn of the messages say different things")
    return messages


def _check_answer(messages: Messages, name: str) -> None:
    """Raise RowError for an answer without text, or with turns other than of the assistant and of tools between them."""
    if not messages:
        raise RowError(f"{name!r} is empty")
    for message in messages:
        if message["role"] not in ASSISTANT:
            raise RowError(
                f"{name!r} holds a turn of {message['role']} ({message['content'].strip()[:60]!r}), and an answer has turns of "
                "the assistant alone; what chosen and rejected share is the prompt, up to the first turn that differs"
            )
    # Templates write an end after each turn, so the model would learn to stop in between.
    if any(turn["role"] == following["role"] == "assistant" for turn, following in pairwise(messages)):
        raise RowError(f"{name!r} has two turns of the assistant one after the other, and an answer ends once; make them one")
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowError(f"{name!r} must begin and end with a turn of the assistant, not with the result of a tool")
    last = messages[-1]
    # An answer may be a call of a tool, or reasoning alone, without content.
    if not last["content"].strip() and not last.get("tool_calls") and not last.get("reasoning_content"):
        raise RowError(f"{name!r} is empty")


def _last_content(messages: Messages) -> str:
    return messages[-1]["content"]
