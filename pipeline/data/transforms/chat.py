"""Dataset types rendered by a chat template: `chat_template.default`, `.argilla_chat`, `.argilla`."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.data.transforms.base import Context, Rendered, Row, RowError, label_field, required, text_field
from pipeline.data.transforms.conversations import after_prompt, answer_start, conversation, with_system
from pipeline.data.transforms.messages import MessageReader, Messages, common_messages, tools_of
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.rendering import Asked, ChatRenderer

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]


def _default(context: Context) -> Callable[[Row], Rendered]:
    """A prompt in `field_messages`; the answers are text, one message, or messages that may repeat the prompt."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, tools = keys.get("field_messages") or "messages", keys.get("field_tools") or "tools"
    columns = {name: keys.get(f"field_{name}") or name for name in ("chosen", "rejected")}

    def render(row: Row) -> Rendered:
        prompt = with_system(reader.messages(required(row, field), field), row, reader)
        answers = {column: reader.answer(required(row, column), column) for column in columns.values()}
        return renderer.render(conversation(prompt, answers, tools=tools_of(row, tools)))

    return render


def _default_prompt(context: Context) -> Callable[[Row], Rendered]:
    """The prompt in `field_messages`, as text."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, tools = keys.get("field_messages") or "messages", keys.get("field_tools") or "tools"

    def read(row: Row) -> Asked:
        return renderer.asked(with_system(reader.messages(required(row, field), field), row, reader), tools_of(row, tools))

    return prompt_rendering(context, read)


def _conversations(context: Context) -> Callable[[Row], tuple[Messages, dict[str, Messages]]]:
    """Of two whole conversations, what they share, which is the prompt, however many turns that is; and the answers."""
    keys, reader = context.keys, MessageReader.from_keys(context.keys)
    names = [keys.get(f"field_{name}") or name for name in ("chosen", "rejected")]

    def divide(row: Row) -> tuple[Messages, dict[str, Messages]]:
        chosen, rejected = (_opened(reader.messages(required(row, name), name), row, reader) for name in names)
        shared = common_messages(chosen, rejected)
        if not any(message["role"] == "user" for message in chosen[:shared]):
            raise RowError("chosen and rejected answer different prompts")
        return chosen[:shared], {names[0]: chosen[shared:], names[1]: rejected[shared:]}

    return divide


def _argilla_chat(context: Context) -> Callable[[Row], Rendered]:
    divide, renderer = _conversations(context), ChatRenderer.of(context, strip_end=True)
    tools = context.keys.get("field_tools") or "tools"
    return lambda row: renderer.render(conversation(*divide(row), tools=tools_of(row, tools)))


def _argilla_chat_prompt(context: Context) -> Callable[[Row], Rendered]:
    divide, renderer = _conversations(context), ChatRenderer.of(context, strip_end=True)
    tools = context.keys.get("field_tools") or "tools"
    return prompt_rendering(context, lambda row: renderer.asked(divide(row)[0], tools_of(row, tools)))


def _opened(messages: Messages, row: Row, reader: MessageReader) -> Messages:
    """Puts the row's `prompt` and `system` before the turns where these lack them."""
    if messages and messages[0]["role"] == "assistant":
        messages = [{"role": "user", "content": text_field(row, "prompt")}, *messages]
    return with_system(messages, row, reader)


def _labelled(context: Context) -> Callable[[Row], Rendered]:
    """A prompt with the answer in a column of its own, or a conversation whose last answer is judged."""
    keys, reader, renderer = context.keys, MessageReader.from_keys(context.keys), ChatRenderer.of(context, strip_end=True)
    field, answer = keys.get("field_messages") or "messages", keys.get("field_completion") or "completion"

    def render(row: Row) -> Rendered:
        messages = with_system(reader.messages(required(row, field), field), row, reader)
        start = answer_start(messages)
        prompt, answers = messages[:start], {field: messages[start:]}
        if answer != field and row.get(answer) is not None:
            given = reader.answer(row[answer], answer)
            prompt = prompt if messages[start:] == after_prompt(given, prompt) else messages
            answers = {answer: given}
        label, tools = label_field(row, keys.get("field_label") or "label"), tools_of(row, keys.get("field_tools") or "tools")
        return renderer.render(conversation(prompt, answers, label, tools))

    return render


def _labelled_conversation(context: Context) -> Callable[[Row], Rendered]:
    """`completion` is the whole conversation."""
    keys = {**context.keys, "field_messages": context.keys.get("field_completion") or "completion"}
    return _labelled(Context(context.tokenizer, context.template, keys))


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
