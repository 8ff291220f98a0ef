"""Notes on prepared data, for the user: each kind once, with a row count, an example and advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Note", "NoteKind", "UNREAD", "Tally", "sentences"]

UNREAD = "not_read"
EXCERPT = 160
"""Characters of an example."""


@dataclass(frozen=True)
class NoteKind:
    """Text of one kind of note. `{detail}` is what rows of the kind differ in: a column, a token."""

    says: str
    advice: str


KINDS = {
    "prompt_repeated": NoteKind("answers begin with the prompt of their row, which is taken once", "give the answers alone"),
    "prompt_guessed": NoteKind(
        "texts have no prompt beside them and no headers of turns, and the prompt is taken to end where the answers part",
        "give the prompt in a column of its own",
    ),
    "read_as_message": NoteKind(
        "the column {detail} holds the JSON text of one message, which was read as that",
        "give it as the content of a message if it is the answer itself",
    ),
    "answer_echoes_prompt": NoteKind(
        "one answer begins with the prompt of its row, and the other doesn't; both were taken as they are",
        "take the prompt out of that answer if it doesn't belong there",
    ),
    "answers_echo_prompt": NoteKind(
        "answers begin with the whole text of the question; they were taken as they are",
        "take it out if it doesn't belong there",
    ),
    "answer_after_answer": NoteKind(
        "the prompt ends in an answer of the assistant, which another one follows",
        "end the prompt where the model is to answer",
    ),
    "think_tags": NoteKind(
        "the chat template took what stands before `</think>` in an answer for reasoning", "take the tag out if it isn't meant"
    ),
    "think_unclosed": NoteKind(
        "answers open `<think>` and never close it; they were taken as they are, behind what the template puts there",
        "drop answers that were cut off, if they aren't meant",
    ),
    "unknown_kwarg": NoteKind(
        "chat_template_kwargs has {detail}, which the chat template doesn't read", "compare it with the template's own names"
    ),
    "reasoning_dropped": NoteKind(
        "the chat template leaves out reasoning of the assistant ({detail})",
        "set chat_template or chat_template_jinja to one that keeps it, if it is to be learned or seen",
    ),
    "opening_missing": NoteKind(
        "asked for an answer, the chat template opens it with {detail}, and these answers don't begin so",
        "give answers with reasoning, or chat_template_kwargs that turn it off",
    ),
    "prompt_differs": NoteKind(
        "the chat template renders a prompt otherwise where an answer follows than where it is asked for",
        "set chat_template to one that renders a turn the same either way",
    ),
    "control_tokens": NoteKind(
        "the text of a message holds {detail}, which the tokenizer reads as a control token",
        "take it out of the rows if it isn't meant, or set encode_special_tokens: false, which makes it text",
    ),
    "end_given": NoteKind("answers hold their end token {detail} already; it is taken once", "give the answers without it"),
    "end_added": NoteKind(
        "the chat template ends no answer; the end token {detail} is added", "set chat_template to one that ends turns"
    ),
    "not_handed": NoteKind(
        "reward functions aren't handed the column {detail}, whose values JSON can't hold", "give it as text or as a number"
    ),
    "end_is_text": NoteKind(
        "what ends an answer, {detail}, is no token of the tokenizer, but text; its own end token is added",
        "set chat_template, or type, to one that the tokenizer has the tokens of (tokenizer_default takes its own)",
    ),
    "dated": NoteKind(
        "the chat template prints the date, and says {detail} each time that these data are prepared",
        "set template_date to another day, or chat_template_jinja to a template without one",
    ),
    "tools_shortened": NoteKind(
        "the chat template leaves out a description of the tools", "set chat_template to one that renders tools as they are"
    ),
    "trimmed": NoteKind(
        "the chat template drops white space that a turn begins with",
        "set chat_template to one that keeps it, if it is meant: an indent of code, say",
    ),
    "foreign_end": NoteKind(
        "answers end in {detail}, which the tokenizer reads as text, before their end", "take it out of the rows"
    ),
    "text_in_end": NoteKind(
        "the chat template writes {detail} before the end of an answer, and the tokenizer reads it as text",
        "set chat_template to one that the tokenizer has the tokens of (tokenizer_default takes its own)",
    ),
    "cut_behind": NoteKind(
        "the chat template writes {detail} behind the end of an answer; it is cut off",
        "set chat_template to one that ends there",
    ),
    "opens_nothing": NoteKind(
        "asked for an answer, the chat template doesn't open one; {detail} before the answer is taken for the prompt's",
        "set chat_template to one that heeds add_generation_prompt: prompts in use lack it",
    ),
    "escaped": NoteKind(
        "the chat template writes what a turn says as JSON, with quotes and line breaks escaped",
        "set chat_template to one that writes it as it is",
    ),
    "may_be_the_label": NoteKind(
        "the column {detail}, which may say which answer is the better one, isn't read",
        "see that chosen is the better one in each row",
    ),
    "prompt_in_training": NoteKind(
        "evaluation rows have a prompt that training rows have too", "take them out of one of the two, unless that is meant"
    ),
    "repeated": NoteKind(
        "the rendered text says more than once what a turn says once",
        "set chat_template to one that says it once, unless tools or the template's own text say the same",
    ),
    "system_moved": NoteKind(
        "the chat template puts a turn of the system before the turns that it follows", "set chat_template to one that keeps it"
    ),
    "tool_results": NoteKind(
        "answers hold results of tools, which are trained on as the answer is", "end the answer at the call of the tool"
    ),
    "picture_placed": NoteKind(
        "messages don't say where their pictures stand, which are put before the text of the user's first turn",
        "give content as parts ({type: image}), if they stand elsewhere",
    ),
    "picture_key": NoteKind(
        "parts of pictures have {detail}, which isn't read: a picture's pixels follow from the processor's settings",
        "set processor_kwargs or image_size, if other pixels are meant",
    ),
    "picture_moved": NoteKind(
        "the chat template puts pictures before the text of their turn",
        "see that the text doesn't refer to their order, or set chat_template_jinja to one that keeps it",
    ),
    "picture_unread": NoteKind(
        "the column {detail} names or holds a picture, and isn't read", "give pictures in the column image, or images"
    ),
    "unreachable": NoteKind(
        "rejected, since {detail} can't be reached, where their pictures are",
        "once it answers, delete the prepared data's folder, and prepare again",
    ),
    UNREAD: NoteKind("no part of the text: column {detail}", "choose a type that reads it if it should be"),
}
"""Kind -> its sentence, which follows `N rows: `, and the setting or change that avoids it."""


@dataclass(frozen=True)
class Note:
    """A note on one row."""

    kind: str
    detail: str = ""
    example: str = ""
    """The text concerned."""


class Tally:
    """Counts of notes, with the first example of each kind and detail."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, source: str, row_number: int, notes: Iterable[Note]) -> None:
        """Count the notes of one row, each kind and detail once."""
        # Once per row: two answers of a row often give the same note.
        for note in {(note.kind, note.detail): note for note in notes}.values():
            example = {"source": source, "row_number": row_number, "text": note.example[:EXCERPT]}
            self._merge({"kind": note.kind, "detail": note.detail, "rows": 1, "example": example})

    def merge(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add the `entries` of another tally; existing examples are kept."""
        for entry in entries:
            self._merge(entry)

    def _merge(self, entry: dict[str, Any]) -> None:
        total = self._entries.setdefault((entry["kind"], entry["detail"]), {**entry, "rows": 0})
        total["rows"] += entry["rows"]

    def entries(self) -> list[dict[str, Any]]:
        """Return JSON-compatible entries: `{kind, detail, rows, example: {source, row_number, text}}`."""
        return list(self._entries.values())


def sentences(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Format every note as a sentence: row count, fact, example, advice. Unread columns share one sentence."""
    entries = list(entries)
    unread = [entry for entry in entries if entry["kind"] == UNREAD]
    if len(unread) > 1:
        entries = [entry for entry in entries if entry["kind"] != UNREAD]
        # The column that most rows have gives count and example for all of them.
        entries.append({**max(unread, key=lambda entry: entry["rows"]), "detail": [entry["detail"] for entry in unread]})
    return [_sentence(entry) for entry in entries]


def _sentence(entry: dict[str, Any]) -> str:
    kind, example, detail = KINDS[entry["kind"]], entry["example"], entry["detail"]
    rows = f"{entry['rows']:,} row{'s' if entry['rows'] != 1 else ''}"
    several = isinstance(detail, list)
    named = ", ".join(map(repr, detail)) if several else repr(detail) if detail else ""
    shown = f": {example['text']!r}" if example["text"] and not several else ""
    return f"{rows}: {kind.says.format(detail=named)} ({example['source']} row {example['row_number']}{shown}); {kind.advice}"
