"""Rendering of conversations with a chat template."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.data.dates import dated, prints_date
from pipeline.data.notes import UNREAD, Note
from pipeline.data.transforms.base import EMPTY, Context, Placeholder, Rendered, RowError
from pipeline.data.transforms.control import control_notes, control_pattern, end_tokens
from pipeline.data.transforms.conversations import Conversation, check_prompt, conversation
from pipeline.data.transforms.marks import MARK, mark
from pipeline.data.transforms.messages import MessageReader, Messages
from pipeline.data.transforms.pictures import as_parts
from pipeline.data.transforms.skeletons import (
    TEXTS,
    Alignment,
    Skeleton,
    search,
    skeleton_key,
    with_placeholders,
    written_forms,
)
from pipeline.data.transforms.tools import function_name, require_tools
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatRenderer", "RenderedPrompt", "find_placeholder"]

UNDEFINED = re.compile(r"'(\w+_token)' is undefined")
RENDERED = ("role", "tool_calls", "tool_call_id", *TEXTS)
"""Properties whose rendering is checked elsewhere, or that only refer to another message."""
PROBES = ("\ue005", "\ue006")
"""Texts before and after the picture by which a template's placeholder is found."""
MAX_SKELETONS = 10_000
"""Skeletons in the cache; with tool calls nearly every row has a form of its own."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text, including the generation prompt."""

    text: str
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class ChatRenderer:
    """Renderer of prompts and answers with a chat template, always as whole conversations.

    An answer is never rendered alone: its rendering (closing an empty `<think>` block, say) depends on the turns before it.
    `strip_end` removes text that the template writes after the last turn's terminator, which no model generates. The rendered
    text is compared with the messages (`skeletons.py`).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    strip_end: bool
    day: date | None = None
    """The date that the template prints as today's; None for that of the clock."""
    placeholder: Placeholder | None = None
    """What stands for a picture; None where messages have none."""
    _skeletons: dict[Hashable, Skeleton | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, context: Context, strip_end: bool) -> ChatRenderer:
        if context.tokenizer is None:
            raise UserError("tokenizer: this dataset type renders a chat template and needs one; got None")
        if not (context.template or context.tokenizer.chat_template):
            raise UserError(
                "chat_template: the tokenizer has no chat template, and the data are conversations; "
                "set chat_template (for instance chatml) or chat_template_jinja"
            )
        return cls(context.tokenizer, context.template, strip_end, context.day, context.placeholder)

    def pair(
        self,
        prompt: Messages,
        chosen: Messages,
        rejected: Messages,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render two answers to a prompt. Raises RowError for invalid messages, and for text that the template loses."""
        answers = {"chosen": _normalised(chosen, "chosen"), "rejected": _normalised(rejected, "rejected")}
        return self.render(conversation(_normalised(prompt, "prompt"), answers, None, tools, template_kwargs))

    def completion(
        self,
        prompt: Messages,
        completion: Messages,
        label: bool,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render a labelled answer to a prompt. Raises RowError as `pair`."""
        answers = {"completion": _normalised(completion, "completion")}
        return self.render(conversation(_normalised(prompt, "prompt"), answers, label, tools, template_kwargs))

    def prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str:
        """Render a prompt with the generation prompt. Raises RowError as `pair`."""
        return self.render_prompt(messages, tools).text

    def render_prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> RenderedPrompt:
        """Render a prompt as `prompt` does, with notes."""
        messages = _normalised(messages, "prompt")
        check_prompt(messages)
        if messages[-1]["role"] == "assistant":
            raise RowError("the prompt ends in a turn of the assistant; it must end where the model is to answer")
        text = self._apply(messages, {"tools": tools}, add_generation_prompt=True)
        alignment = self._align(messages, text, {"tools": tools}, add_generation_prompt=True)
        notes = self._require_tools(text, messages, {"tools": tools}, add_generation_prompt=True)
        if not self._opens_answers(messages, {"tools": tools}):
            notes.append(Note("opens_nothing", example=text[-80:]))
        return RenderedPrompt(text, (*alignment.notes, *notes, *control_notes(messages, self._control), *self._date_notes))

    def render(self, source: Conversation) -> Rendered:
        """Render a conversation. Raises RowError where the template loses or changes its text."""
        kwargs = {"tools": source.tools, **source.template_kwargs}
        # The prompt includes the generation prompt if the answers begin with it; else it is found by `_before_answers`.
        opened_prompt = self._apply(source.prompt, kwargs, add_generation_prompt=True)
        # Prompt and answer in one rendering: a turn may be rendered differently as the last one.
        answers = [self._answer(source, messages, kwargs, opened_prompt) for messages in source.whole]
        texts = [answer.text for answer in answers]
        if len(texts) == 2 and texts[0] == texts[1]:
            raise RowError("chosen and rejected are the same once the chat template has rendered them")
        notes = [*source.notes, *(note for answer in answers for note in answer.notes), *self._date_notes]
        notes += control_notes(source.prompt, self._control)
        notes += [Note("unknown_kwarg", name) for name in source.template_kwargs if name not in self._source]
        prompt = opened_prompt
        # Such as where the generation prompt opens `<think>`, and an answer without reasoning doesn't.
        if not all(text.startswith(opened_prompt) for text in texts):
            prompt, prompt_notes = _before_answers(answers, opened_prompt)
            notes += prompt_notes
        else:
            # What the template writes between prompt and answer: the header of the turn, if it opens none when asked.
            before = {answer.text[len(opened_prompt) : answer.start] for answer in answers if answer.start is not None}
            header = before.pop() if len(before) == 1 else ""
            if header.strip() and not self._opens_answers(source.prompt, kwargs):
                prompt = opened_prompt + header
                notes.append(Note("opens_nothing", header.strip(), prompt[-80:]))
        return Rendered(prompt, tuple(texts), templated=True, label=source.label, notes=tuple(notes))

    def _answer(self, source: Conversation, messages: Messages, kwargs: Mapping[str, Any], opened_prompt: str) -> _Answer:
        """Render one answer with its prompt, with exactly one end token."""
        # The end of the turn is whatever the template writes after the answer's last string. An answer that contains that end
        # token itself is rendered again without it; text after the end is cut, and a missing end is replaced by EOS.
        first = len(source.prompt)
        text = self._apply(messages, kwargs)
        shared = _common_prefix(opened_prompt, text)
        alignment = self._align(messages, text, kwargs, first, len(shared))
        self._require_calls(text, messages, kwargs)
        tool_notes = self._require_tools(text, messages, kwargs)
        end, content = text[alignment.end :].strip(), messages[-1]["content"].rstrip()
        # The calls stand behind the content, so only an end token can be distinguished from them.
        if messages[-1].get("tool_calls"):
            end = next((token for token in self._ends if end.endswith(token)), "")
        # Rendered again without it, not cut: the template may place its end elsewhere.
        if end and content.endswith(end):
            if not content.removesuffix(end).strip() and not messages[-1].get("tool_calls"):
                raise RowError(f"an answer is empty but for its end token {end!r}")
            trimmed = [*messages[:-1], {**messages[-1], "content": content.removesuffix(end).rstrip()}]
            answer = self._answer(source, trimmed, kwargs, opened_prompt)
            return replace(answer, notes=(*answer.notes, Note("end_given", end, content[-80:])))
        is_empty = not messages[-1]["content"].strip() and not messages[-1].get("tool_calls")
        if is_empty and any(note.kind == "reasoning_dropped" for note in alignment.notes):
            raise RowError("an answer is nothing but reasoning, which the chat template leaves out")
        notes = [
            *alignment.notes,
            *tool_notes,
            *control_notes(messages[first:], self._control),
            *self._unread(text, messages, kwargs),
        ]
        notes += _changed(text, messages, alignment)
        if "<think>" in content and "</think>" not in content.rpartition("<think>")[2]:
            notes.append(Note("think_unclosed", example=content[-80:]))
        # Otherwise `alignment.end` is that of an earlier string, and the first end token behind it closes another turn.
        if (len(messages) - 1, "content") in alignment.spans:
            text, cut = self._until_end(text, alignment.end)
            notes += [Note("cut_behind", cut.strip(), text[-80:])] if cut else []
            end = text[alignment.end :].strip()
        # Generation doesn't stop at an end that is plain text, so EOS follows it.
        is_text = bool(end) and (self._control is None or self._control.search(end) is None)
        if self.tokenizer.eos_token and (is_text or not end):
            text = text.rstrip() + self.tokenizer.eos_token
            kind, detail = ("end_is_text", end) if is_text else ("end_added", self.tokenizer.eos_token)
            notes.append(Note(kind, detail, text[-80:]))
        return _Answer(
            text.rstrip() if self.strip_end else text, alignment.start(first), alignment.end_before(first), tuple(notes)
        )

    def _opens_answers(self, prompt: Messages, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the template writes a generation prompt."""
        # By skeletons, which are cached: two more renderings per row would be slow.
        with_opening, without = (self._skeleton(prompt, kwargs, is_opened) for is_opened in (True, False))
        return with_opening is None or with_opening != without

    def _until_end(self, text: str, content_end: int) -> tuple[str, str]:
        """Split the text after the end token of its last turn; returns the text, and the part that is cut off.

        Args:
            content_end: position after the last string of that turn.
        """
        ends = [(at, at + len(end)) for end in self._ends if (at := text.find(end, content_end)) >= 0]
        if not ends:
            return text, ""
        end = min(ends)[1]
        return (text, "") if not text[end:].strip() else (text[:end], text[end:])

    def _unread(self, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> list[Note]:
        """Return a note of each property of messages that isn't rendered: without it, the text is the same."""
        notes = []
        for index, message in enumerate(messages):
            for name in [name for name, value in message.items() if name not in RENDERED and value not in EMPTY]:
                without = {other: value for other, value in message.items() if other != name}
                # A template can't read a property that its text doesn't name, which saves a rendering.
                if name not in self._source or self._renders_as(
                    text, [*messages[:index], without, *messages[index + 1 :]], kwargs
                ):
                    notes.append(Note(UNREAD, f"{name} of messages", str(message[name])))
        return notes

    def _renders_as(self, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> bool:
        try:
            return self._apply(messages, kwargs) == text
        except RowError:  # the template requires the property
            return False

    @cached_property
    def _source(self) -> str:
        """The template's text."""
        # A tokenizer may have several templates by name, as a dict.
        default = self.tokenizer.chat_template
        return self.template or (json.dumps(default) if isinstance(default, dict) else default or "")

    @cached_property
    def _date_notes(self) -> tuple[Note, ...]:
        return (Note("dated", str(self.day)),) if self.day is not None and prints_date(self._source) else ()

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return end_tokens(self.tokenizer)

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return control_pattern(self.tokenizer)

    def _align(
        self,
        messages: Messages,
        text: str,
        kwargs: Mapping[str, Any],
        answer_from: int | None = None,
        earliest: int = 0,
        add_generation_prompt: bool = False,
    ) -> Alignment:
        """Find the strings of the messages in the rendered text. Raises RowError when one is missing, repeated or moved.

        The answer's messages begin with `answer_from`, and its text not before `earliest`.
        """
        skeleton = self._skeleton(messages, kwargs, add_generation_prompt)
        if skeleton is not None and (missing := skeleton.missing) is not None:
            content = messages[missing]["content"].strip()[:80]
            raise RowError(
                f"the chat template leaves out what turn {missing + 1} ({messages[missing]['role']}) says: {content!r}"
            )
        if skeleton is not None and skeleton.repeated is not None:
            raise RowError(f"the chat template renders what turn {skeleton.repeated + 1} says twice")
        moved = None if skeleton is None else skeleton.moved
        # Templates put the system turn first on purpose; any other order changes the conversation.
        if moved is not None and messages[moved]["role"] not in ("system", "developer"):
            raise RowError(f"the chat template moves turn {moved + 1} ({messages[moved]['role']}) behind a later one")
        alignment = None if skeleton is None else skeleton.align(messages, text)
        if alignment is not None and moved is not None:
            return replace(alignment, notes=(*alignment.notes, Note("system_moved", example=messages[moved]["content"])))
        return alignment or search(messages, text, len(messages) if answer_from is None else answer_from, earliest)

    def _require_tools(
        self, text: str, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> list[Note]:
        """Check as `require_tools` does, and that tools change the text: a name may occur in it by chance."""
        tools = kwargs.get("tools")
        notes = require_tools(text, messages, tools)
        if tools:
            try:
                without = self._apply(messages, {**kwargs, "tools": None}, add_generation_prompt)
            # A template may require tools; then they can't be without effect.
            except RowError:
                return notes
            if without == text:
                raise RowError(f"the chat template does not render tools ({function_name(tools[0])!r}); use one that does")
        return notes

    def _require_calls(self, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> None:
        """Raise RowError for tool calls that don't change the rendered text."""
        for index, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            without = {name: value for name, value in message.items() if name != "tool_calls"}
            if self._renders_as(text, [*messages[:index], without, *messages[index + 1 :]], kwargs):
                name = function_name(message["tool_calls"][0])
                raise RowError(f"the chat template does not render tool_calls ({name!r} is missing); use one that does")

    def _skeleton(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> Skeleton | None:
        """Return the cached skeleton of the conversation's form; None where the template doesn't accept placeholders."""
        key = (skeleton_key(messages, kwargs), add_generation_prompt)
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_SKELETONS:
                self._skeletons.clear()
            try:
                skeleton = Skeleton.of(messages, self._apply(with_placeholders(messages), kwargs, add_generation_prompt))
            except RowError:
                skeleton = None
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _dated_template(self, kwargs: Mapping[str, Any]) -> str:
        assert self.day is not None
        # `get_chat_template` chooses among several templates as `apply_chat_template` does: by name, or `tool_use` with tools.
        return dated(self.tokenizer.get_chat_template(self.template, kwargs.get("tools")), self.day)

    def _apply(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
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

    def _render(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self._dated_template(kwargs) if self._date_notes else self.template,
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
    renderer = ChatRenderer.of(context, strip_end=False)
    try:
        without = renderer._render([{"role": "user", "content": texts}], {}, add_generation_prompt=False)
    except RowError:
        return Placeholder(token)
    # A list that is printed as Python prints it has escapes.
    if not all(probe in without for probe in PROBES):
        return Placeholder(token)
    try:
        content = [texts[0], {"type": "image"}, texts[1]]
        text = renderer._render([{"role": "user", "content": content}], {}, add_generation_prompt=False)
    except RowError:
        return Placeholder(token, takes_parts=True)
    start, length = len(_common_prefix(without, text)), len(text) - len(without)
    written = text[start : start + length]
    is_added = length > 0 and text[:start] + text[start + length :] == without
    return Placeholder(token, written if is_added and written.count(token) == 1 else None, takes_parts=True)


@dataclass(frozen=True)
class _Answer:
    """Prompt and answer as text; `start` of the answer's first string (None without any), `prompt_end` of the prompt's last."""

    text: str
    start: int | None
    prompt_end: int
    notes: tuple[Note, ...]


_READER = MessageReader.from_keys({})


def _normalised(messages: Messages, name: str) -> Messages:
    """Normalise messages of a registered dataset type."""
    return [_READER.message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def _before_answers(answers: list[_Answer], opened_prompt: str) -> tuple[str, list[Note]]:
    """Return the prompt where the template renders it differently without an answer: the common text before the answers.

    Raises:
        RowError: when the prompt isn't the same text before both answers.
    """
    beginnings = [
        answer.text[: answer.start] if answer.start is not None else _common_prefix(opened_prompt, answer.text)
        for answer in answers
    ]
    head = _common_prefix(*beginnings)
    if len(head) < max(answer.prompt_end for answer in answers):
        raise RowError("the chat template renders the prompt otherwise before each answer, so that they share none")
    if opened_prompt.startswith(head):
        opening = opened_prompt[len(head) :].strip()
        notes = [Note("opening_missing", opening, opened_prompt[-80:])] if opening else []
        # Where an answer begins with the generation prompt, each has its own prompt, up to where the texts diverge. Otherwise
        # an answer that begins with `<b>` would lose its bracket, which the opening `<think>` shares.
        return opened_prompt if any(answer.text.startswith(opened_prompt) for answer in answers) else head, notes
    shared = _common_prefix(opened_prompt, head)
    return head, [Note("prompt_differs", example=opened_prompt[len(shared) :][:80])]


def _common_prefix(*texts: str) -> str:
    if all(text.startswith(texts[0]) for text in texts[1:]):  # the usual case; a comparison by character is slow
        return texts[0]
    return os.path.commonprefix(texts)  # noqa: RUF071 - by character is what we want


def _changed(text: str, messages: Messages, alignment: Alignment) -> list[Note]:
    """Return a note of each turn whose leading white space is dropped, or whose text is written as JSON."""
    notes = []
    for index, message in enumerate(messages):
        content = message["content"]
        if (index, "content") not in alignment.spans:
            continue
        start, end = alignment.spans[index, "content"]
        if content[:1].isspace() and text[start : start + 1] != content[0]:
            notes.append(Note("trimmed", example=content[:80]))
        if text[start:end] not in content and text[start:end] in written_forms(content):
            notes.append(Note("escaped", example=content[:80]))
    return notes
