"""Prompts alone: what the trainer is handed of a row, and the text whose ids TRL's `GRPOTrainer` 1.16 feeds to the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.data.transforms.base import Context, Rendered, Row, refuse_media, require_text
from pipeline.data.transforms.messages import Messages
from pipeline.data.transforms.rendering import Asked, ChatRenderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptReader", "prompt_rendering"]

PromptReader = Callable[[Row], "str | Asked | Messages"]
"""The prompt of a row as the trainer is to have it: text, rendered or not, or messages that it renders itself."""


def prompt_rendering(context: Context, read: PromptReader) -> Callable[[Row], Rendered]:
    """Render what `read` finds: messages with the chat template, text as it is.

    To TRL text is text, templated or not, and gets the tokenizer's BOS; one that it begins with is taken off, in what the
    trainer is handed too, so that it comes once.
    """
    bos = _added_bos(context.tokenizer)
    renderer = cache(lambda: ChatRenderer.of(context, strip_end=False))

    def render(row: Row) -> Rendered:
        refuse_media(row)
        prompt = read(row)
        if isinstance(prompt, str):
            prompt = Asked(prompt, ())
        if isinstance(prompt, Asked):
            text = require_text(prompt.text.removeprefix(bos), "prompt")
            return Rendered(text, (), templated=False, handed=_handed(row, text), notes=prompt.notes)
        asked = renderer().asked(prompt)
        return Rendered(asked.text, (), templated=True, handed=_handed(row, prompt), notes=asked.notes)

    return render


def _added_bos(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The BOS that the tokenizer puts before text by itself; "" when it puts none."""
    if tokenizer is None or not tokenizer.bos_token:
        return ""
    return tokenizer.bos_token if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _handed(row: Row, prompt: str | Messages) -> dict[str, Any]:
    """The prompt, and every other column that JSON can hold, for the reward functions."""
    others = {name: value for name, value in row.items() if name != "prompt" and _is_json(value)}
    return {"prompt": prompt, **others}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
