"""TRL's own dataset formats, distinguished row by row: explicit or implicit prompt, plain text or conversations.

Their ids are those of TRL 1.16 (`DPOTrainer._prepare_dataset`, `KTOTrainer._prepare_dataset`,
`GRPOTrainer._tokenize_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pipeline.data.transforms.base import Context, Rendered, Row, RowError, label_field, parsed, require_text, required
from pipeline.data.transforms.conversations import conversation, is_contained_in, with_system
from pipeline.data.transforms.messages import MessageReader, Messages, common_messages, tools_of
from pipeline.data.transforms.plain import labelled_text, paired_text, split_prompt, unprompted_pair
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.rendering import ChatRenderer

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]


def _reader(context: Context) -> MessageReader:
    return MessageReader.from_keys(context.keys)


def _template_arguments(row: Row) -> dict[str, Any]:
    """Return the arguments that TRL passes to the chat template besides the messages."""
    kwargs = parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(f"'chat_template_kwargs' must be a mapping, got {type(kwargs).__name__}")
    return {"tools": tools_of(row, "tools"), "template_kwargs": kwargs}


def _are_conversations(reader: MessageReader, **values: Any) -> bool:
    """Return True for conversations, False for text. Raises RowError for a mixture."""
    kinds = {name: reader.is_conversation(value) for name, value in values.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {'messages' if kind else 'text'}" for name, kind in kinds.items())
        raise RowError(f"all must be messages or all text, but {listed}")
    return all(kinds.values())


def _split_conversation(row: Row, reader: MessageReader) -> tuple[Messages, dict[str, Messages]]:
    """Split a row whose answers are messages, which may be whole conversations, into prompt and answers."""
    chosen, rejected = (reader.answer(row[name], name) for name in ("chosen", "rejected"))
    given_prompt = row.get("prompt")
    if reader.is_conversation(given_prompt):
        return reader.messages(given_prompt, "prompt"), {"chosen": chosen, "rejected": rejected}
    # Implicit prompt: the common turns, as in TRL's `extract_prompt`; a text column may repeat them or add the question.
    shared = common_messages(chosen, rejected)
    prompt, answers = chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if given_prompt is None or is_contained_in(require_text(given_prompt, "prompt"), prompt):
        if not any(message["role"] == "user" for message in prompt):
            raise RowError("chosen and rejected share no beginning that could be the prompt")
        return prompt, answers
    if any(message["role"] == "user" for message in chosen + rejected):
        raise RowError("the column 'prompt' is not in the turns that chosen and rejected share")
    return [*prompt, {"role": "user", "content": given_prompt}], answers


def _renderer(context: Context) -> Callable[[], ChatRenderer]:
    """Return a function that builds the renderer at the first row of messages: rows of text need no chat template."""
    return cache(lambda: ChatRenderer.of(context, strip_end=False))


def _pair(context: Context) -> Callable[[Row], Rendered]:
    reader, renderer = _reader(context), _renderer(context)

    def render(row: Row) -> Rendered:
        # The kind is decided by the answers: a text prompt may stand beside conversations that repeat it.
        chosen, rejected = required(row, "chosen"), required(row, "rejected")
        if _are_conversations(reader, chosen=chosen, rejected=rejected):
            prompt, answers = _split_conversation(row, reader)
            return renderer().render(conversation(with_system(prompt, row, reader), answers, **_template_arguments(row)))
        chosen, rejected = require_text(chosen, "chosen"), require_text(rejected, "rejected")
        if row.get("prompt") is None or reader.is_conversation(row["prompt"]):
            if row.get("prompt") is not None:
                # Raises for messages beside text; here it can't return.
                _are_conversations(reader, prompt=row["prompt"], chosen=chosen, rejected=rejected)
            return unprompted_pair(chosen, rejected)
        return paired_text(require_text(row["prompt"], "prompt"), chosen, rejected)

    return render


def _labelled(context: Context) -> Callable[[Row], Rendered]:
    reader, renderer = _reader(context), _renderer(context)

    def render(row: Row) -> Rendered:
        prompt, completion, label = required(row, "prompt"), required(row, "completion"), label_field(row)
        if _are_conversations(reader, prompt=prompt, completion=completion):
            messages = with_system(reader.messages(prompt, "prompt"), row, reader)
            labelled = conversation(
                messages, {"completion": reader.answer(completion, "completion")}, label, **_template_arguments(row)
            )
            return renderer().render(labelled)
        return labelled_text(require_text(prompt, "prompt"), require_text(completion, "completion"), label)

    return render


def _prompt_reader(context: Context) -> Callable[[Row], str | Messages]:
    """Read `prompt`, or the common beginning of chosen and rejected where it is missing or only repeats that as text."""
    reader = _reader(context)

    def read(row: Row) -> str | Messages:
        prompt = row.get("prompt")
        paired = row.get("chosen") is not None and row.get("rejected") is not None
        if (
            paired
            and not reader.is_conversation(prompt)
            and _are_conversations(reader, chosen=row["chosen"], rejected=row["rejected"])
        ):
            return _refuse_template_arguments(row, with_system(_split_conversation(row, reader)[0], row, reader))
        if prompt is None and paired:
            return split_prompt(require_text(row["chosen"], "chosen"), require_text(row["rejected"], "rejected"))[0]
        if reader.is_conversation(required(row, "prompt")):
            return _refuse_template_arguments(row, with_system(reader.messages(prompt, "prompt"), row, reader))
        return require_text(prompt, "prompt")

    return read


def _refuse_template_arguments(row: Row, prompt: Messages) -> Messages:
    """Return the prompt. Raises RowError for arguments of the chat template that the trainer wouldn't pass."""
    if ignored := [name for name in ("tools", "chat_template_kwargs") if parsed(row.get(name))]:
        raise RowError(f"grpo renders messages without the row's {ignored[0]!r}; type: chat_template.default renders tools")
    return prompt


PAIR_TYPES = {"passthrough": _pair}
UNPAIRED_TYPES = {"passthrough": _labelled}
PROMPT_TYPES = {"passthrough": lambda context: prompt_rendering(context, _prompt_reader(context))}
