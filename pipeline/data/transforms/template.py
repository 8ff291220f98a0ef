"""A chat template applied to messages: their text, with marks where it writes their pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.data.dates import dated, prints_date
from pipeline.data.notes import Note
from pipeline.data.transforms.base import Context, Placeholder, RowError
from pipeline.data.transforms.marks import MARK, mark
from pipeline.data.transforms.messages import Messages
from pipeline.data.transforms.pictures import as_parts
from pipeline.data.transforms.skeletons import Skeleton, skeleton_key, with_placeholders
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "common_prefix", "find_placeholder"]

UNDEFINED = re.compile(r"'(\w+_token)' is undefined")
PROBES = ("\ue005", "\ue006")
"""Texts before and after the picture by which a template's placeholder is found."""
MAX_SKELETONS = 10_000
"""Skeletons in the cache; with tool calls nearly every row has a form of its own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or a dataset's own."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """Jinja source of a dataset's own; None for the tokenizer's."""
    day: date | None = None
    """The date that the template prints as today's; None for that of the clock."""
    placeholder: Placeholder | None = None
    """What stands for a picture; None where messages have none."""
    _skeletons: dict[Hashable, Skeleton | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, context: Context) -> ChatTemplate:
        """Return the template of a context. Raises UserError without one."""
        if context.tokenizer is None:
            raise UserError("tokenizer: this dataset type renders a chat template and needs one; got None")
        if not (context.template or context.tokenizer.chat_template):
            raise UserError(
                "chat_template: the tokenizer has no chat template, and the data are conversations; "
                "set chat_template (for instance chatml) or chat_template_jinja"
            )
        return cls(context.tokenizer, context.template, context.day, context.placeholder)

    @cached_property
    def source(self) -> str:
        """The template's text."""
        # A tokenizer may have several templates by name, as a dict.
        default = self.tokenizer.chat_template
        return self.template or (json.dumps(default) if isinstance(default, dict) else default or "")

    @cached_property
    def date_notes(self) -> tuple[Note, ...]:
        """A note where the template prints the date."""
        return (Note("dated", str(self.day)),) if self.day is not None and prints_date(self.source) else ()

    def apply(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        """Render messages, with marks for the pictures that the template writes. Raises RowError."""
        placeholder = self.placeholder
        if placeholder is None:
            return self._render(messages, kwargs, add_generation_prompt)
        marks = [number for message in messages for number in MARK.findall(message["content"])]
        if marks and placeholder.written is None:
            raise RowError("the chat template renders no pictures; set chat_template_jinja to one that does")
        if not placeholder.takes_parts:
            return self._render(messages, kwargs, add_generation_prompt)
        # All turns, as TRL does, whether they have pictures or not.
        parts = [{**message, "content": as_parts(message["content"])} for message in messages]
        text = self._render(parts, kwargs, add_generation_prompt)
        if not marks:
            return text
        # Split into the texts around the pictures: a placeholder in a turn's own text would be one more.
        around = text.split(placeholder.written or "")
        if len(around) != len(marks) + 1:
            raise RowError(
                f"the rendered text has {len(around) - 1} placeholders of pictures ({placeholder.written!r}), and the messages "
                f"have {len(marks)} pictures"
            )
        marked = [before + mark(int(number)) for before, number in zip(around, marks, strict=False)]
        return "".join([*marked, around[-1]])

    def renders_as(self, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> bool:
        """Return whether messages are rendered as a text."""
        try:
            return self.apply(messages, kwargs) == text
        except RowError:  # the template requires the property
            return False

    def skeleton(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> Skeleton | None:
        """Return the cached skeleton of the conversation's form; None where the template doesn't accept placeholders."""
        key = (skeleton_key(messages, kwargs), add_generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            try:
                skeleton = Skeleton.of(messages, self.apply(with_placeholders(messages), kwargs, add_generation_prompt))
            except RowError:
                skeleton = None
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _dated_template(self, kwargs: Mapping[str, Any]) -> str:
        assert self.day is not None
        # `get_chat_template` chooses among several templates as `apply_chat_template` does: by name, or `tool_use` with tools.
        return dated(self.tokenizer.get_chat_template(self.template, kwargs.get("tools")), self.day)

    def _render(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self._dated_template(kwargs) if self.date_notes else self.template,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        # A template is a program that runs on the row: any of its exceptions makes the row invalid.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            token = UNDEFINED.search(str(error))
            hint = (
                f"; the tokenizer has none: give it one (special_tokens.{token[1]}), or another chat_template" if token else ""
            )
            raise RowError(f"the chat template does not take this conversation: {error}{hint}") from error


def find_placeholder(context: Context, token: str) -> Placeholder:
    """Return what the chat template of a context writes for a picture: what is more with a picture than without.

    Args:
        context: template and tokenizer.
        token: what the processor expands, once in what is written.
    """
    if context.tokenizer is None or not (context.template or context.tokenizer.chat_template):
        return Placeholder(token)
    texts: list[dict[str, Any]] = [{"type": "text", "text": probe} for probe in PROBES]
    template = ChatTemplate.of(context)
    try:
        without = template._render([{"role": "user", "content": texts}], {}, add_generation_prompt=False)
    except RowError:
        return Placeholder(token)
    # A list that is printed as Python prints it has escapes.
    if not all(probe in without for probe in PROBES):
        return Placeholder(token)
    try:
        content = [texts[0], {"type": "image"}, texts[1]]
        text = template._render([{"role": "user", "content": content}], {}, add_generation_prompt=False)
    except RowError:
        return Placeholder(token, takes_parts=True)
    start, length = len(common_prefix(without, text)), len(text) - len(without)
    written = text[start : start + length]
    is_added = length > 0 and text[:start] + text[start + length :] == without
    return Placeholder(token, written if is_added and written.count(token) == 1 else None, takes_parts=True)


def common_prefix(*texts: str) -> str:
    """Return the characters that all texts begin with."""
    if all(text.startswith(texts[0]) for text in texts[1:]):  # the usual case; a comparison by character is slow
        return texts[0]
    return os.path.commonprefix(texts)  # noqa: RUF071 - by character is what we want
