"""Renders conversations with a chat template."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Context, Rendered, RowError
from pipeline.data.transforms.control import control_notes, control_pattern, end_tokens, strings_of
from pipeline.data.transforms.conversations import Conversation, check_prompt, conversation
from pipeline.data.transforms.messages import MessageReader, Messages
from pipeline.data.transforms.skeletons import Placed, Skeleton, form_of, search, signed
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Asked", "ChatRenderer"]

MOST_FORMS = 10_000
"""Skeletons that are kept; with calls of tools nearly every row has a form of its own."""


@dataclass(frozen=True)
class Asked:
    """A prompt as text, with what opens the answer."""

    text: str
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class ChatRenderer:
    """Prompt and answers as text, rendered as whole conversations.

    An answer is never rendered alone: what the template does to it (closing an empty `<think>` block, say) depends on
    what comes before it. `strip_end` removes what the template writes after the last turn's terminator, which no model
    ever generates. What is rendered is compared with what was given (`skeletons.py`).
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    strip_end: bool
    _skeletons: dict[str, Skeleton | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, context: Context, strip_end: bool) -> ChatRenderer:
        if context.tokenizer is None:
            raise UserError("tokenizer: this dataset type renders a chat template and needs one; got None")
        if not (context.template or context.tokenizer.chat_template):
            raise UserError(
                "chat_template: the tokenizer has no chat template, and the data are conversations; "
                "set chat_template (for instance chatml) or chat_template_jinja"
            )
        return cls(context.tokenizer, context.template, strip_end)

    def pair(
        self,
        prompt: Messages,
        chosen: Messages,
        rejected: Messages,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Two answers to a prompt. Raises RowError for what is no such thing, or is lost by the template."""
        answers = {"chosen": _read(chosen, "chosen"), "rejected": _read(rejected, "rejected")}
        return self.render(conversation(_read(prompt, "prompt"), answers, None, tools, template_kwargs))

    def completion(
        self,
        prompt: Messages,
        completion: Messages,
        label: bool,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """A labelled answer to a prompt. Raises RowError as `pair`."""
        answers = {"completion": _read(completion, "completion")}
        return self.render(conversation(_read(prompt, "prompt"), answers, label, tools, template_kwargs))

    def prompt(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str:
        """A prompt that the model is to answer, with what opens the answer. Raises RowError as `pair`."""
        return self.asked(messages, tools).text

    def asked(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> Asked:
        """As `prompt`, with what is to be known of it."""
        messages = _read(messages, "prompt")
        check_prompt(messages)
        if messages[-1]["role"] == "assistant":
            raise RowError("the prompt ends in a turn of the assistant; it must end where the model is to answer")
        text = self._apply(messages, {"tools": tools}, add_generation_prompt=True)
        placed = self._place(messages, text, {"tools": tools}, add_generation_prompt=True)
        _require_tools(text, messages, tools)
        return Asked(text, (*placed.notes, *control_notes(messages, self._control)))

    def render(self, given: Conversation) -> Rendered:
        """Raises RowError where the template doesn't say what the conversation says."""
        kwargs = {"tools": given.tools, **given.template_kwargs}
        asked = self._apply(given.prompt, kwargs, add_generation_prompt=True)
        answers = [self._answer(given, messages, kwargs, asked) for messages in given.whole]
        texts = [answer.text for answer in answers]
        if len(texts) == 2 and texts[0] == texts[1]:
            raise RowError("chosen and rejected are the same once the chat template has rendered them")
        notes = [*given.notes, *(note for answer in answers for note in answer.notes)]
        prompt = asked
        if not all(text.startswith(asked) for text in texts):
            prompt, found = _before_answers(answers, asked)
            notes += found
        return Rendered(prompt, tuple(texts), templated=True, label=given.label, notes=tuple(notes))

    def _answer(self, given: Conversation, messages: Messages, kwargs: Mapping[str, Any], asked: str) -> _Answer:
        """One answer with its prompt, as text that ends in what ends the turn, once."""
        first = len(given.prompt)
        text = self._apply(messages, kwargs)
        shared = _shared(asked, text)
        placed = self._place(messages, text, kwargs, first, len(shared))
        self._require_calls(text, messages, kwargs)
        _require_tools(text, messages, given.tools)
        end, said = text[placed.end :].strip(), messages[-1]["content"].rstrip()
        if messages[-1].get("tool_calls"):
            end = next((one for one in self._ends if end.endswith(one)), "")
        if end and said.endswith(end):
            if not said.removesuffix(end).strip() and not messages[-1].get("tool_calls"):
                raise RowError(f"an answer is empty but for its end token {end!r}")
            trimmed = [*messages[:-1], {**messages[-1], "content": said.removesuffix(end).rstrip()}]
            answer = self._answer(given, trimmed, kwargs, asked)
            return replace(answer, notes=(*answer.notes, Note("end_given", end, said[-80:])))
        silent = not messages[-1]["content"].strip() and not messages[-1].get("tool_calls")
        if silent and any(note.kind == "reasoning_dropped" for note in placed.notes):
            raise RowError("an answer is nothing but reasoning, which the chat template leaves out")
        notes = [*placed.notes, *control_notes(messages, self._control)]
        if not end and self.tokenizer.eos_token:
            text = text.rstrip() + self.tokenizer.eos_token
            notes.append(Note("end_added", self.tokenizer.eos_token, text[-80:]))
        return _Answer(text.rstrip() if self.strip_end else text, placed.start(first), placed.end_before(first), tuple(notes))

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return end_tokens(self.tokenizer)

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return control_pattern(self.tokenizer)

    def _place(
        self,
        messages: Messages,
        text: str,
        kwargs: Mapping[str, Any],
        answer_from: int | None = None,
        earliest: int = 0,
        add_generation_prompt: bool = False,
    ) -> Placed:
        """Where the strings of the messages stand in what the template made of them. Raises RowError when they don't.

        The answer's messages begin with `answer_from`, and its text not before `earliest`.
        """
        skeleton = self._skeleton(messages, kwargs, add_generation_prompt)
        if skeleton is not None and (missing := skeleton.missing(messages)) is not None:
            said = messages[missing]["content"].strip()[:80]
            raise RowError(f"the chat template leaves out what turn {missing + 1} ({messages[missing]['role']}) says: {said!r}")
        if skeleton is not None and skeleton.repeated is not None:
            raise RowError(f"the chat template renders what turn {skeleton.repeated + 1} says twice")
        placed = None if skeleton is None else skeleton.place(messages, text)
        return placed or search(messages, text, len(messages) if answer_from is None else answer_from, earliest)

    def _require_calls(self, text: str, messages: Messages, kwargs: Mapping[str, Any]) -> None:
        """Raises RowError where a turn's calls of tools change nothing of the text."""
        for index, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            without = {name: value for name, value in message.items() if name != "tool_calls"}
            try:
                lost = self._apply([*messages[:index], without, *messages[index + 1 :]], kwargs) == text
            except RowError:  # it takes the turn with its calls only
                continue
            if lost:
                name = _function_name(message["tool_calls"][0])
                raise RowError(f"the chat template does not render tool_calls ({name!r} is missing); use one that does")

    def _skeleton(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> Skeleton | None:
        """That of the conversation's form; None where the template doesn't take signs for text."""
        form = json.dumps([form_of(messages), {**kwargs}, add_generation_prompt], default=str)
        if form not in self._skeletons:
            if len(self._skeletons) >= MOST_FORMS:
                self._skeletons.clear()
            try:
                made = Skeleton.of(self._apply(signed(messages), kwargs, add_generation_prompt))
            except RowError:
                made = None
            self._skeletons[form] = made
        return self._skeletons[form]

    def _apply(self, messages: Messages, kwargs: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        # the template is a program that runs on the row: whatever it cannot digest is the row's fault
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowError(f"the chat template does not take this conversation: {error}") from error


@dataclass(frozen=True)
class _Answer:
    """Prompt and answer as text: where the answer's first string begins (None without any), where the prompt's last ends."""

    text: str
    start: int | None
    prompt_end: int
    notes: tuple[Note, ...]


_READER = MessageReader.from_keys({})


def _read(messages: Messages, name: str) -> Messages:
    """Messages of a type from outside in the form that ours have."""
    return [_READER.message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def _before_answers(answers: list[_Answer], asked: str) -> tuple[str, list[Note]]:
    """The prompt where the template renders it otherwise when nobody answers: what stands before both answers.

    Raises:
        RowError: when that isn't the same text before both, or can't be found.
    """
    begun = [answer.text[: answer.start] if answer.start is not None else _shared(asked, answer.text) for answer in answers]
    head = _shared(*begun)
    if len(head) < max(answer.prompt_end for answer in answers):
        raise RowError("the chat template renders the prompt otherwise before each answer, so that they share none")
    if asked.startswith(head):
        opening = asked[len(head) :].strip()
        notes = [Note("opening_missing", opening, asked[-80:])] if opening else []
        # Where an answer begins as asked, each has its own prompt, up to where the texts diverge. Elsewhere that would cost an
        # answer that begins with `<b>` its bracket, which the opening `<think>` has too.
        return asked if any(answer.text.startswith(asked) for answer in answers) else head, notes
    shared = _shared(asked, head)
    return head, [Note("prompt_differs", example=asked[len(shared) :][:80])]


def _shared(*texts: str) -> str:
    """What all begin with."""
    return os.path.commonprefix(texts)  # noqa: RUF071 - by character is what we want


def _require_tools(text: str, messages: Messages, tools: list[dict[str, Any]] | None) -> None:
    """A template without tools would drop them silently, and train the model to say nothing instead of calling."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    for what, items in (("tool_calls", calls), ("tools", tools or [])):
        if missing := [name for name in map(_function_name, items) if name not in text]:
            raise RowError(f"the chat template does not render {what} ({missing[0]!r} is missing); use one that does")
    for string in (string for call in calls for string in strings_of(_function(call).get("arguments"))):
        if not any(form in text for form in (string, json.dumps(string, ensure_ascii=False)[1:-1], json.dumps(string)[1:-1])):
            raise RowError(f"the chat template does not render an argument of a tool call ({string[:80]!r}); use one that does")


def _function(item: Any) -> Mapping[str, Any]:
    """What a tool or a tool call says of its function."""
    function = item.get("function", item) if isinstance(item, Mapping) else item
    return function if isinstance(function, Mapping) else {}


def _function_name(item: Any) -> str:
    """Name of the function that a tool or a tool call is about."""
    name = _function(item).get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"a tool or tool call must name its function, got {item!r}")
    return name
