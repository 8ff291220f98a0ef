"""The normal form of a row of messages: what it gives, before a template makes text of it.

Every dataset type whose rows are messages, or become messages, makes a `Conversation`, and nothing else is rendered. So what
holds of one type's answers holds of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Row, RowError, optional_text
from pipeline.data.transforms.messages import ASSISTANT, MessageReader, Messages

__all__ = [
    "Conversation",
    "FEW_WORDS",
    "after_prompt",
    "answer_start",
    "check_prompt",
    "conversation",
    "is_told_in",
    "with_system",
]

FEW_WORDS = 3
"""A prompt of fewer words on one line is no sign that an answer repeats it: an answer to "Hi" may well begin so."""


@dataclass(frozen=True)
class Conversation:
    """A prompt, and the answers to it by the column that they come from: two of a pair, or one with a label.

    Messages have `role` and `content` (text), and whatever else they came with. An answer holds turns of the assistant, and of
    tools between them.
    """

    prompt: Messages
    answers: Mapping[str, Messages]
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @property
    def whole(self) -> list[Messages]:
        """Prompt and answer together, for each answer."""
        return [self.prompt + messages for messages in self.answers.values()]


def conversation(
    prompt: Messages,
    answers: Mapping[str, Messages],
    label: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Conversation:
    """A conversation whose parts are what they should be. Answers may repeat the prompt, which is taken once.

    Raises:
        RowError: for no prompt, an answer without text or with turns of another role, equal answers.
    """
    check_prompt(prompt)
    notes: list[Note] = []
    if prompt[-1]["role"] == "assistant":
        notes.append(Note("answer_after_answer", example=_said(prompt)))
    after = {}
    for name, messages in answers.items():
        after[name] = after_prompt(messages, prompt)
        if len(after[name]) < len(messages):
            notes.append(Note("prompt_repeated", example=_said(messages)))
        _check_answer(after[name], name)
        if any(message["role"] == "tool" for message in after[name]):
            notes.append(Note("tool_results", example=_said(after[name])))
    if len(after) == 2 and len({str(messages) for messages in after.values()}) == 1:
        raise RowError("chosen and rejected are the same")
    question = _said(prompt)
    if len(question.split()) >= FEW_WORDS and all(messages[0]["content"].startswith(question) for messages in after.values()):
        notes.append(Note("answers_echo_prompt", example=question))
    return Conversation(prompt, after, label, tools, template_kwargs or {}, tuple(notes))


def check_prompt(prompt: Messages) -> None:
    """Raises RowError for a prompt that asks nothing: no turn, or an empty one of the user."""
    if not prompt:
        raise RowError("the prompt is empty")
    for place, message in enumerate(prompt):
        if message["role"] == "user" and not message["content"].strip():
            raise RowError(f"turn {place + 1} of the prompt, of the user, is empty")


def after_prompt(messages: Messages, prompt: Messages) -> Messages:
    """The turns that follow `prompt` where the messages repeat it, with its system turn or without; else all of them."""
    asked = prompt[1:] if prompt and prompt[0]["role"] in ("system", "developer") else prompt
    for one in (prompt, asked):
        if one and messages[: len(one)] == one:
            return messages[len(one) :]
    return messages


def answer_start(messages: Messages) -> int:
    """Where the last answer begins: a run of assistant and tool turns at the end."""
    start = len(messages)
    while start and messages[start - 1]["role"] in ASSISTANT:
        start -= 1
    return start


def is_told_in(question: str, turns: Messages) -> bool:
    """Whether turns hold the text of a column beside them: as a turn or a part of one, or as all of them in one text."""
    return any(question.strip() in turn["content"] for turn in turns) or (
        bool(turns) and all(turn["content"].strip() in question for turn in turns)
    )


def with_system(messages: Messages, row: Row, reader: MessageReader) -> Messages:
    """The messages with the row's `system` before them, where they have none of their own."""
    system = optional_text(row, "system")
    if not system.strip() or reader.drop_system_message:
        return messages
    own = next((message["content"] for message in messages if message["role"] in ("system", "developer")), None)
    if own is None:
        return [{"role": "system", "content": system}, *messages]
    if own.strip() != system.strip():
        raise RowError("the column 'system' and the system turn of the messages say different things")
    return messages


def _check_answer(messages: Messages, name: str) -> None:
    """Raises RowError unless an answer is one: turns of the assistant that say something."""
    if not messages:
        raise RowError(f"{name!r} is empty")
    for message in messages:
        if message["role"] not in ASSISTANT:
            raise RowError(
                f"{name!r} holds a turn of {message['role']} ({message['content'].strip()[:60]!r}), and an answer has turns of "
                "the assistant alone; what chosen and rejected share is the prompt, up to the first turn that differs"
            )
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise RowError(f"{name!r} must begin and end with a turn of the assistant, not with the result of a tool")
    last = messages[-1]
    if not last["content"].strip() and not last.get("tool_calls") and not last.get("reasoning_content"):
        raise RowError(f"{name!r} is empty")


def _said(messages: Messages) -> str:
    return messages[-1]["content"]
