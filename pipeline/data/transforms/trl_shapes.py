"""TRL's own shapes, told apart row by row: explicit or implicit prompt, plain text or conversations.

The ids that come of them are those of TRL 1.16 (`DPOTrainer._prepare_dataset`, `KTOTrainer._prepare_dataset`,
`GRPOTrainer._tokenize_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from pipeline.data.transforms.base import Context, Rendered, Row, RowError, label_field, parsed, require_text, required
from pipeline.data.transforms.conversations import conversation, is_told_in, with_system
from pipeline.data.transforms.messages import MessageReader, Messages, common_messages, tools_of
from pipeline.data.transforms.plain import labelled_text, paired_text, split_prompt
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.rendering import ChatRenderer

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]


def _reader(context: Context) -> MessageReader:
    return MessageReader.from_keys(context.keys)


def _rendering(row: Row) -> dict[str, Any]:
    """What TRL hands to the chat template besides the messages."""
    kwargs = parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, Mapping):
        raise RowError(f"'chat_template_kwargs' must be a mapping, got {type(kwargs).__name__}")
    return {"tools": tools_of(row, "tools"), "template_kwargs": kwargs}


def _same_kind(reader: MessageReader, **values: Any) -> bool:
    """True for conversations, False for text, an error for a mixture."""
    kinds = {name: reader.is_conversation(value) for name, value in values.items()}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {'messages' if kind else 'text'}" for name, kind in kinds.items())
        raise RowError(f"all must be messages or all text, but {listed}")
    return all(kinds.values())


def _divided(row: Row, reader: MessageReader) -> tuple[Messages, dict[str, Messages]]:
    """The prompt and the answers of a row whose answers are messages, which may be whole conversations."""
    chosen, rejected = (reader.answer(row[name], name) for name in ("chosen", "rejected"))
    given = row.get("prompt")
    if reader.is_conversation(given):
        return reader.messages(given, "prompt"), {"chosen": chosen, "rejected": rejected}
    shared = common_messages(chosen, rejected)
    prompt, answers = chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if given is None or is_told_in(require_text(given, "prompt"), prompt):
        if not any(message["role"] == "user" for message in prompt):
            raise RowError("chosen and rejected share no beginning that could be the prompt")
        return prompt, answers
    if any(message["role"] == "user" for message in chosen + rejected):
        raise RowError("the column 'prompt' is not in the turns that chosen and rejected share")
    return [*prompt, {"role": "user", "content": given}], answers


def _renderer(context: Context) -> Callable[[], ChatRenderer]:
    """Makes a renderer once, when the first row of messages needs one: rows of text need no chat template."""
    return cache(lambda: ChatRenderer.of(context, strip_end=False))


def _pair(context: Context) -> Callable[[Row], Rendered]:
    reader, renderer = _reader(context), _renderer(context)

    def render(row: Row) -> Rendered:
        chosen, rejected = required(row, "chosen"), required(row, "rejected")
        if _same_kind(reader, chosen=chosen, rejected=rejected):
            prompt, answers = _divided(row, reader)
            made = conversation(with_system(prompt, row, reader), answers, **_rendering(row))
            return renderer().render(made)
        chosen, rejected = require_text(chosen, "chosen"), require_text(rejected, "rejected")
        if row.get("prompt") is None or reader.is_conversation(row["prompt"]):
            if row.get("prompt") is not None:
                _same_kind(reader, prompt=row["prompt"], chosen=chosen, rejected=rejected)
            return paired_text(*split_prompt(chosen, rejected))
        return paired_text(require_text(row["prompt"], "prompt"), chosen, rejected)

    return render


def _labelled(context: Context) -> Callable[[Row], Rendered]:
    reader, renderer = _reader(context), _renderer(context)

    def render(row: Row) -> Rendered:
        prompt, completion, label = required(row, "prompt"), required(row, "completion"), label_field(row)
        if _same_kind(reader, prompt=prompt, completion=completion):
            asked = with_system(reader.messages(prompt, "prompt"), row, reader)
            made = conversation(asked, {"completion": reader.answer(completion, "completion")}, label, **_rendering(row))
            return renderer().render(made)
        return labelled_text(require_text(prompt, "prompt"), require_text(completion, "completion"), label)

    return render


def _asked(context: Context) -> Callable[[Row], str | Messages]:
    """The prompt: `prompt`, or what chosen and rejected share where it is missing or only repeats their start as text."""
    reader = _reader(context)

    def read(row: Row) -> str | Messages:
        given = row.get("prompt")
        paired = row.get("chosen") is not None and row.get("rejected") is not None
        if paired and not reader.is_conversation(given) and _same_kind(reader, chosen=row["chosen"], rejected=row["rejected"]):
            return _unaided(row, with_system(_divided(row, reader)[0], row, reader))
        if given is None and paired:
            return split_prompt(require_text(row["chosen"], "chosen"), require_text(row["rejected"], "rejected"))[0]
        if reader.is_conversation(required(row, "prompt")):
            return _unaided(row, with_system(reader.messages(given, "prompt"), row, reader))
        return require_text(given, "prompt")

    return read


def _unaided(row: Row, prompt: Messages) -> Messages:
    """The prompt, unless the trainer would render it without something that the row gives the chat template."""
    if ignored := [name for name in ("tools", "chat_template_kwargs") if parsed(row.get(name))]:
        raise RowError(f"grpo renders messages without the row's {ignored[0]!r}; type: chat_template.default renders tools")
    return prompt


PAIR_TYPES = {"passthrough": _pair}
UNPAIRED_TYPES = {"passthrough": _labelled}
PROMPT_TYPES = {"passthrough": lambda context: prompt_rendering(context, _asked(context))}
