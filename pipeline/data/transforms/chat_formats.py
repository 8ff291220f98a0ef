"""Dataset types that write ChatML, Llama 3 or Zephyr turns themselves: `chatml.*`, `llama3.*`, `zephyr.nectar`.

Column names and strings are Axolotl's. Where Axolotl loses data (later turns of `argilla_chat`, Nectar's best answer), we
keep it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.data.notes import Note
from pipeline.data.transforms.base import (
    Context,
    Rendered,
    Row,
    RowError,
    label_field,
    list_field,
    require_text,
    text_field,
)
from pipeline.data.transforms.control import control_notes, control_pattern
from pipeline.data.transforms.conversations import Conversation, conversation, is_contained_in, with_system
from pipeline.data.transforms.messages import MessageReader, Messages, refuse_conversation
from pipeline.data.transforms.plain import paired_text, refuse_other_turns
from pipeline.data.transforms.prompts import prompt_rendering
from pipeline.data.transforms.skeletons import REASONING

__all__ = ["PAIR_TYPES", "PROMPT_TYPES", "UNPAIRED_TYPES"]

PairShape = Callable[[Row], Conversation]
PromptShape = Callable[[Row], Messages]
"""Reads the turns before the answer."""
Factory = Callable[[Context], Callable[[Row], Rendered]]


@dataclass(frozen=True)
class TurnFormat:
    """Turn markers of one family of models."""

    turn: str
    answer: str
    end: str

    def prompt(self, messages: Messages) -> str:
        """Format the turns of a prompt. Raises RowError for tool calls and reasoning, which these formats don't have."""
        for message in messages:
            if unsupported := [name for name in ("tool_calls", *REASONING) if message.get(name)]:
                raise RowError(f"a turn has {unsupported[0]!r}, which this type can't write; chat_template.default can")
        return "".join(self.turn.format(role=message["role"], content=message["content"]) for message in messages) + self.answer

    def render(self, source: Conversation, control: re.Pattern[str] | None) -> Rendered:
        """Format a conversation; an answer is one turn with a single end token. Raises RowError for more turns."""
        prompt, notes, sequences = self.prompt(source.prompt), list(source.notes), []
        for name, messages in source.answers.items():
            if len(messages) > 1:
                raise RowError(f"{name!r} has {len(messages)} turns, and this type takes one; chat_template.default takes more")
            # Only for its errors: tool calls and reasoning of an answer.
            self.prompt(messages)
            content = messages[0]["content"]
            if content.rstrip().endswith(self.end):
                notes.append(Note("end_given", self.end, content[-80:]))
            while content.rstrip().endswith(self.end):
                content = content.rstrip().removesuffix(self.end)
            if not content.strip():
                raise RowError(f"{name!r} is empty but for its end")
            notes += control_notes([*source.prompt, {"content": content}], control)
            sequences.append(prompt + content + self.end)
        # templated=False: the tokenizer adds BOS, which these formats lack; `tokenise` adds no EOS behind the end token.
        return Rendered(prompt, tuple(sequences), templated=False, label=source.label, notes=tuple(notes))


CHATML = TurnFormat("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>")
LLAMA3 = TurnFormat(
    "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
QUESTIONS = ("prompt", "input", "question", "instruction")


READER = MessageReader.from_keys({})


def _prompt_messages(row: Row, question: str) -> Messages:
    # The column must be one question: serialised messages would become the text of a single turn.
    refuse_conversation(question, "prompt")
    return with_system([{"role": "user", "content": question}], row, READER)


def _answer_messages(text: str, name: str) -> Messages:
    return READER.answer(text, name)


def _conversation(row: Row, column: str) -> Messages:
    """Read a conversation of at least a question and an answer. Raises RowError."""
    messages = READER.messages(list_field(row, column), column)
    if len(messages) < 2:
        raise RowError(f"{column!r} must hold a question and an answer, got one message")
    return with_system(messages, row, READER)


def _columns(
    questions: tuple[str, ...], chosen: tuple[str, ...] = ("chosen",), rejected: tuple[str, ...] = ("rejected",)
) -> PairShape:
    def pair(row: Row) -> Conversation:
        question = text_field(row, *questions)
        answers = {names[0]: text_field(row, *names) for names in (chosen, rejected)}
        for name, answer in answers.items():
            refuse_other_turns(question, answer, name)
        return conversation(
            _prompt_messages(row, question), {name: _answer_messages(answer, name) for name, answer in answers.items()}
        )

    return pair


def _argilla_chat(row: Row) -> Conversation:
    chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected answer different prompts")
    return conversation(chosen[:-1], {"chosen": chosen[-1:], "rejected": rejected[-1:]})


def _ultra(row: Row) -> Conversation:
    """Read whole conversations with their prompt also as text, or answers alone."""
    chosen, rejected = (READER.messages(list_field(row, name), name) for name in ("chosen", "rejected"))
    question = text_field(row, "prompt")
    if any(message["role"] == "user" for message in chosen + rejected):
        whole = _argilla_chat(row)
        if not is_contained_in(question, whole.prompt):
            raise RowError("the column 'prompt' is not in the turns that chosen and rejected share")
        return whole
    if chosen[:-1] != rejected[:-1]:
        raise RowError("chosen and rejected answer different prompts")
    prompt = with_system([*chosen[:-1], {"role": "user", "content": question}], row, READER)
    return conversation(prompt, {"chosen": chosen[-1:], "rejected": rejected[-1:]})


def _prompt_column(*questions: str) -> PromptShape:
    return lambda row: _prompt_messages(row, text_field(row, *questions))


def _ultra_prompt(row: Row) -> Messages:
    # More turns than question and answer: only the conversation has the earlier ones.
    if row.get("chosen") is not None and len(list_field(row, "chosen")) > 2:
        return _argilla_chat(row).prompt
    return _prompt_messages(row, text_field(row, "prompt"))


PAIRS: dict[str, PairShape] = {
    "default": _columns(QUESTIONS, ("chosen", "chosen_response"), ("rejected", "rejected_response")),
    "argilla": _columns(("instruction",), ("chosen_response", "chosen"), ("rejected_response", "rejected")),
    "argilla_chat": _argilla_chat,
    "icr": _columns(("input",)),
    "intel": _columns(("question",)),
    "prompt_pairs": _columns(("prompt",)),
    "ultra": _ultra,
}
COMPLETIONS: dict[str, tuple[str, ...]] = {
    "default": QUESTIONS,
    "argilla": ("instruction",),
    "intel": ("question",),
    "prompt_pairs": ("prompt",),
    "ultra": ("prompt",),
}
PROMPTS: dict[str, PromptShape] = {
    **{shape: _prompt_column(*questions) for shape, questions in COMPLETIONS.items()},
    "argilla_chat": lambda row: _argilla_chat(row).prompt,
    "icr": _prompt_column("input"),
    "ultra": _ultra_prompt,
}


def _rendering(turns: TurnFormat, read: PairShape) -> Factory:
    def build(context: Context) -> Callable[[Row], Rendered]:
        control = control_pattern(context.tokenizer)
        return lambda row: turns.render(read(row), control)

    return build


def _labelled(turns: TurnFormat, questions: tuple[str, ...] | None) -> Factory:
    def read(row: Row) -> Conversation:
        if questions is None:
            messages = _conversation(row, "completion")
            prompt, completion = messages[:-1], messages[-1:]
        else:
            question, answer = text_field(row, *questions), text_field(row, "completion")
            refuse_other_turns(question, answer, "completion")
            prompt, completion = _prompt_messages(row, question), _answer_messages(answer, "completion")
        return conversation(prompt, {"completion": completion}, label_field(row))

    return _rendering(turns, read)


def _prompted(turns: TurnFormat, shape: PromptShape) -> Factory:
    return lambda context: prompt_rendering(context, lambda row: turns.prompt(shape(row)))


def _nectar_prompt(row: Row) -> str:
    """Format Nectar's prompts, a dialogue `\\n\\nHuman: ...\\n\\nAssistant: `; plain text is one turn of the user."""
    prompt = text_field(row, "prompt")
    parts = SPEAKERS.split(prompt)
    # Text before the first speaker means that `Human:` occurs within plain text.
    if parts[0].strip() or len(parts) < 3:
        return f"<|system|>\n</s>\n<|user|>\n{prompt}</s>\n<|assistant|>\n"
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if turns[-1][0] != "Assistant" or turns[-1][1].strip():
        raise RowError("the dialogue in 'prompt' must end where the assistant is to answer")
    dialogue = "".join(f"<|{NECTAR[speaker]}|>\n{text}</s>\n" for speaker, text in turns[:-1])
    return f"<|system|>\n</s>\n{dialogue}<|assistant|>\n"


def _nectar(context: Context) -> Callable[[Row], Rendered]:
    """Pair the best and the worst answer: Nectar ranks from 1, the best. Axolotl sorts in reverse and pairs the two worst."""

    def render(row: Row) -> Rendered:
        answers = list_field(row, "answers")
        for index, answer in enumerate(answers):
            rank = answer.get("rank") if isinstance(answer, dict) else None
            if not isinstance(rank, int | float) or not math.isfinite(rank):
                raise RowError(f"answers[{index}] must have 'answer' and a number as 'rank'")
        if len(answers) < 2:
            raise RowError("'answers' must hold two answers at least")
        ranked = sorted(answers, key=lambda answer: answer["rank"])
        if ranked[0]["rank"] == ranked[-1]["rank"]:
            raise RowError("all answers have the same rank")
        chosen, rejected = (require_text(answer.get("answer"), "answer") for answer in (ranked[0], ranked[-1]))
        for answer in (chosen, rejected):
            refuse_other_turns(text_field(row, "prompt"), answer, "answer")
        return paired_text(_nectar_prompt(row), chosen, rejected)

    return render


NECTAR = {"Human": "user", "Assistant": "assistant"}
SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
FORMATS = {"chatml": CHATML, "llama3": LLAMA3}
PAIR_TYPES = {f"{name}.{shape}": _rendering(turns, PAIRS[shape]) for name, turns in FORMATS.items() for shape in PAIRS}
PAIR_TYPES["zephyr.nectar"] = _nectar
PROMPT_TYPES = {f"{name}.{shape}": _prompted(turns, PROMPTS[shape]) for name, turns in FORMATS.items() for shape in PROMPTS}
PROMPT_TYPES["zephyr.nectar"] = lambda context: prompt_rendering(context, _nectar_prompt)
UNPAIRED_TYPES = {
    f"{name}.{shape}": _labelled(turns, questions)
    for name, turns in FORMATS.items()
    for shape, questions in {**COMPLETIONS, "argilla_chat": None}.items()
}
