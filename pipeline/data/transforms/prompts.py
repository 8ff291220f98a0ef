"""Rows of prompts: columns for the trainer, and the text whose ids TRL's `GRPOTrainer` 1.16 feeds to the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Context, Rendered, Row, refuse_media, require_text
from pipeline.data.transforms.messages import Messages
from pipeline.data.transforms.rendering import ChatRenderer, RenderedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptReader", "prompt_rendering"]

PromptReader = Callable[[Row], "str | RenderedPrompt | Messages"]
"""Reads the prompt of a row for the trainer: text, rendered or not, or messages that the trainer renders itself."""


def prompt_rendering(context: Context, read: PromptReader) -> Callable[[Row], Rendered]:
    """Render the prompt that `read` returns: messages with the chat template, text unchanged.

    TRL adds the tokenizer's BOS to text, templated or not. A BOS that the text begins with is removed, also from the prompt
    that the trainer receives, so that there is only one.
    """
    bos = _added_bos(context.tokenizer)
    renderer = cache(lambda: ChatRenderer.of(context, strip_end=False))

    def render(row: Row) -> Rendered:
        # Here, since every column is handed on as a reward column, and so none is unread.
        refuse_media(row)
        prompt = read(row)
        if isinstance(prompt, str):
            prompt = RenderedPrompt(prompt, ())
        if isinstance(prompt, RenderedPrompt):
            text = require_text(prompt.text.removeprefix(bos), "prompt")
            notes = (*prompt.notes, *_unrepresentable_notes(row))
            # templated=False: `tokenise` adds the BOS that was removed above, as TRL's `GRPOTrainer` does.
            return Rendered(text, (), templated=False, reward_columns=_reward_columns(row, text), notes=notes)
        rendered = renderer().render_prompt(prompt)
        notes = (*rendered.notes, *_unrepresentable_notes(row))
        # The trainer gets the messages and renders them itself; the text is for the ids, the length limit and the preview.
        return Rendered(rendered.text, (), templated=True, reward_columns=_reward_columns(row, prompt), notes=notes)

    return render


def _added_bos(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the BOS that the tokenizer adds to text; "" when it adds none."""
    if tokenizer is None or not tokenizer.bos_token:
        return ""
    # By what the tokenizer does: some have a `bos_token` that they never add.
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _reward_columns(row: Row, prompt: str | Messages) -> dict[str, Any]:
    """Return the prompt, and every other column that JSON can represent, for the reward functions."""
    others = {name: value for name, value in row.items() if name != "prompt" and _is_json(value)}
    return {"prompt": prompt, **others}


def _unrepresentable_notes(row: Row) -> list[Note]:
    return [Note("not_handed", name, str(value)) for name, value in row.items() if name != "prompt" and not _is_json(value)]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
