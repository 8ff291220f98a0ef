"""Dataset types rendered by a chat template: `chat_template.default`, `.argilla_chat`, `.argilla`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipeline.data.transforms.base import Context, Rendered, Row, RowError, label_field, required, text_field
from pipeline.data.transforms.conversations import after_prompt, answer_start, conversation, with_system
from pipeline.data.transforms.messages import MessageReader, Messages, common_messages, tools_of
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.rendering import ChatRenderer, RenderedPrompt

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]


def _default(context: Context) -> Callable[[Row], Rendered]:
    """Read the prompt from `field_messages`; answers are text, one message, or messages that may repeat the prompt."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, tools = keys.get("field_messages") or "messages", keys.get("field_tools") or "tools"
    columns = {name: keys.get(f"field_{name}") or name for name in ("chosen", "rejected")}

    def render(row: Row) -> Rendered:
        if row.get(field) is None and reader.is_conversation(row.get(columns["chosen"])):
            raise RowError(
                f"no column {field!r}; {columns['chosen']!r} is a conversation: type chat_template.argilla_chat takes the "
                f"prompt from there, and field_messages names another column (the row has {', '.join(row)})"
            )
        prompt = with_system(reader.messages(required(row, field), field), row, reader)
        answers = {column: reader.answer(required(row, column), column) for column in columns.values()}
        return renderer.render(conversation(prompt, answers, tools=tools_of(row, tools)))

    return render


def _default_prompt(context: Context) -> Callable[[Row], Rendered]:
    """Render the prompt of `field_messages` to text."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, tools = keys.get("field_messages") or "messages", keys.get("field_tools") or "tools"

    def read(row: Row) -> RenderedPrompt:
        return renderer.render_prompt(
            with_system(reader.messages(required(row, field), field), row, reader), tools_of(row, tools)
        )

    return prompt_rendering(context, read)


def _conversation_splitter(context: Context) -> Callable[[Row], tuple[Messages, dict[str, Messages]]]:
    """Split two whole conversations into their common turns, which are the prompt, and the answers."""
    keys, reader = context.keys, MessageReader.from_keys(context.keys)
    names = [keys.get(f"field_{name}") or name for name in ("chosen", "rejected")]

    def split(row: Row) -> tuple[Messages, dict[str, Messages]]:
        chosen, rejected = (_with_prompt(reader.messages(required(row, name), name), row, reader) for name in names)
        split_at = common_messages(chosen, rejected)
        if not any(message["role"] == "user" for message in chosen[:split_at]):
            raise RowError("chosen and rejected answer different prompts")
        return chosen[:split_at], {names[0]: chosen[split_at:], names[1]: rejected[split_at:]}

    return split


def _argilla_chat(context: Context) -> Callable[[Row], Rendered]:
    split, renderer = _conversation_splitter(context), ChatRenderer.of(context, strip_end=True)
    tools = context.keys.get("field_tools") or "tools"
    return lambda row: renderer.render(conversation(*split(row), tools=tools_of(row, tools)))


def _argilla_chat_prompt(context: Context) -> Callable[[Row], Rendered]:
    split, renderer = _conversation_splitter(context), ChatRenderer.of(context, strip_end=True)
    tools = context.keys.get("field_tools") or "tools"
    return prompt_rendering(context, lambda row: renderer.render_prompt(split(row)[0], tools_of(row, tools)))


def _with_prompt(messages: Messages, row: Row, reader: MessageReader) -> Messages:
    """Prepend the row's `prompt` and `system` to turns that lack them."""
    if messages and messages[0]["role"] == "assistant":
        messages = [{"role": "user", "content": text_field(row, "prompt")}, *messages]
    return with_system(messages, row, reader)


def _labelled(context: Context) -> Callable[[Row], Rendered]:
    """Read a prompt with its completion in another column, or a conversation whose last answer is labelled."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, answer = keys.get("field_messages") or "messages", keys.get("field_completion") or "completion"

    def render(row: Row) -> Rendered:
        messages = with_system(reader.messages(required(row, field), field), row, reader)
        start = answer_start(messages)
        prompt, answers = messages[:start], {field: messages[start:]}
        if answer != field and row.get(answer) is not None:
            completion = reader.answer(row[answer], answer)
            # The messages may already end in the completion, which is then no part of the prompt.
            prompt = prompt if messages[start:] == after_prompt(completion, prompt) else messages
            answers = {answer: completion}
        label, tools = label_field(row, keys.get("field_label") or "label"), tools_of(row, keys.get("field_tools") or "tools")
        return renderer.render(conversation(prompt, answers, label, tools))

    return render


def _labelled_conversation(context: Context) -> Callable[[Row], Rendered]:
    # Here the completion column holds the whole conversation.
    keys = {**context.keys, "field_messages": context.keys.get("field_completion") or "completion"}
    return _labelled(replace(context, keys=keys))


PAIR_TYPES = {
    "chat_template.default": _default,
    "chat_template.argilla_chat": _argilla_chat,
    "chat_template.argilla": _argilla_chat,
}
PROMPT_TYPES = {
    "chat_template.default": _default_prompt,
    "chat_template.argilla_chat": _argilla_chat_prompt,
    "chat_template.argilla": _argilla_chat_prompt,
}
UNPAIRED_TYPES = {"chat_template.default": _labelled, "chat_template.argilla_chat": _labelled_conversation}
