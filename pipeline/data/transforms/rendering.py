"""Rendering of prompts and answers with a chat template (`template.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pipeline.data.notes import UNREAD, Note
from pipeline.data.transforms.base import EMPTY, Context, Rendered, RowError
from pipeline.data.transforms.control import control_notes, control_pattern, end_tokens
from pipeline.data.transforms.conversations import Conversation, check_prompt, conversation
from pipeline.data.transforms.messages import MessageReader, Messages
from pipeline.data.transforms.skeletons import TEXTS, Alignment, search, written_forms
from pipeline.data.transforms.template import ChatTemplate, common_prefix
from pipeline.data.transforms.tools import function_name, require_tools

__all__ = ["ChatRenderer", "RenderedPrompt"]

RENDERED = ("role", "tool_calls", "tool_call_id", *TEXTS)
"""Properties whose rendering is checked elsewhere, or that only refer to another message."""


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

    template: ChatTemplate
    strip_end: bool

    @classmethod
    def of(cls, context: Context, strip_end: bool) -> ChatRenderer:
        """Return the renderer of a context. Raises UserError without a chat template."""
        return cls(ChatTemplate.of(context), strip_end)

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
        text = self.template.apply(messages, {"tools": tools}, add_generation_prompt=True)
        alignment = self._align(messages, text, {"tools": tools}, add_generation_prompt=True)
        notes = self._require_tools(text, messages, {"tools": tools}, add_generation_prompt=True)
        if not self._opens_answers(messages, {"tools": tools}):
            notes.append(Note("opens_nothing", example=text[-80:]))
        return RenderedPrompt(
            text, (*alignment.notes, *notes, *control_notes(messages, self._control), *self.template.date_notes)
        )

    def render(self, source: Conversation) -> Rendered:
        """Render a conversation. Raises RowError where the template loses or changes its text."""
        kwargs = {"tools": source.tools, **source.template_kwargs}
        # The prompt includes the generation prompt if the answers begin with it; else it is found by `_before_answers`.
        opened_prompt = self.template.apply(source.prompt, kwargs, add_generation_prompt=True)
        # Prompt and answer in one rendering: a turn may be rendered differently as the last one.
        answers = [self._answer(source, messages, kwargs, opened_prompt) for messages in source.whole]
        texts = [answer.text for answer in answers]
        if len(texts) == 2 and texts[0] == texts[1]:
            raise RowError("chosen and rejected are the same once the chat template has rendered them")
        notes = [*source.notes, *(note for answer in answers for note in answer.notes), *self.template.date_notes]
        notes += control_notes(source.prompt, self._control)
        notes += [Note("unknown_kwarg", name) for name in source.template_kwargs if name not in self.template.source]
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
        text = self.template.apply(messages, kwargs)
        shared = common_prefix(opened_prompt, text)
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
        if self.template.tokenizer.eos_token and (is_text or not end):
            text = text.rstrip() + self.template.tokenizer.eos_token
            kind, detail = ("end_is_text", end) if is_text else ("end_added", self.template.tokenizer.eos_token)
            notes.append(Note(kind, detail, text[-80:]))
        return _Answer(
            text.rstrip() if self.strip_end else text, alignment.start(first), alignment.end_before(first), tuple(notes)
        )

    def _opens_answers(self, prompt: Messages, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the template writes a generation prompt."""
        # By skeletons, which are cached: two more renderings per row would be slow.
        with_opening, without = (self.template.skeleton(prompt, kwargs, is_opened) for is_opened in (True, False))
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
                if name not in self.template.source or self.template.renders_as(
                    text, [*messages[:index], without, *messages[index + 1 :]], kwargs
                ):
                    notes.append(Note(UNREAD, f"{name} of messages", str(message[name])))
        return notes

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return end_tokens(self.template.tokenizer)

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return control_pattern(self.template.tokenizer)

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
        skeleton = self.template.skeleton(messages, kwargs, add_generation_prompt)
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
                without = self.template.apply(messages, {**kwargs, "tools": None}, add_generation_prompt)
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
            if self.template.renders_as(text, [*messages[:index], without, *messages[index + 1 :]], kwargs):
                name = function_name(message["tool_calls"][0])
                raise RowError(f"the chat template does not render tool_calls ({name!r} is missing); use one that does")


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
        answer.text[: answer.start] if answer.start is not None else common_prefix(opened_prompt, answer.text)
        for answer in answers
    ]
    head = common_prefix(*beginnings)
    if len(head) < max(answer.prompt_end for answer in answers):
        raise RowError("the chat template renders the prompt otherwise before each answer, so that they share none")
    if opened_prompt.startswith(head):
        opening = opened_prompt[len(head) :].strip()
        notes = [Note("opening_missing", opening, opened_prompt[-80:])] if opening else []
        # Where an answer begins with the generation prompt, each has its own prompt, up to where the texts diverge. Otherwise
        # an answer that begins with `<b>` would lose its bracket, which the opening `<think>` shares.
        return opened_prompt if any(answer.text.startswith(opened_prompt) for answer in answers) else head, notes
    shared = common_prefix(opened_prompt, head)
    return head, [Note("prompt_differs", example=opened_prompt[len(shared) :][:80])]


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
