"""Notes: what a person should know of the data that was prepared. Each comes once, with a count, an example and what to do."""

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
    """What one kind of note says. `{detail}` stands for what rows of the same kind differ in: a column, a token."""

    says: str
    advice: str


KINDS = {
    "prompt_repeated": NoteKind("answers begin with the prompt of their row, which is taken once", "give the answers alone"),
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
    "tool_results": NoteKind(
        "answers hold results of tools, which are trained on as the answer is", "end the answer at the call of the tool"
    ),
    UNREAD: NoteKind("no part of the text: column {detail}", "choose a type that reads it if it should be"),
}
"""Kind -> its sentence, of which `N rows: ` is the beginning, and which setting or change would alter that."""


@dataclass(frozen=True)
class Note:
    """What one row gives rise to."""

    kind: str
    detail: str = ""
    example: str = ""
    """The text that it is about."""


class Tally:
    """Counts notes of rows, and keeps the first example of each kind and detail."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, source: str, row_number: int, notes: Iterable[Note]) -> None:
        """Count the notes of one row, each kind and detail once."""
        for note in {(note.kind, note.detail): note for note in notes}.values():
            example = {"source": source, "row_number": row_number, "text": note.example[:EXCERPT]}
            self._merge({"kind": note.kind, "detail": note.detail, "rows": 1, "example": example})

    def merge(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add what `entries` of another tally holds; the examples of the first to come stay."""
        for entry in entries:
            self._merge(entry)

    def _merge(self, entry: dict[str, Any]) -> None:
        found = self._found.setdefault((entry["kind"], entry["detail"]), {**entry, "rows": 0})
        found["rows"] += entry["rows"]

    def entries(self) -> list[dict[str, Any]]:
        """`{kind, detail, rows, example: {source, row_number, text}}` each, as JSON takes them."""
        return list(self._found.values())


def sentences(entries: Iterable[dict[str, Any]]) -> list[str]:
    """Every note as a sentence: how many rows, what is so, where for instance, and what to do. Unread columns share one."""
    entries = list(entries)
    unread = [entry for entry in entries if entry["kind"] == UNREAD]
    if len(unread) > 1:
        entries = [entry for entry in entries if entry["kind"] != UNREAD]
        entries.append({**max(unread, key=lambda entry: entry["rows"]), "detail": [entry["detail"] for entry in unread]})
    return [_sentence(entry) for entry in entries]


def _sentence(entry: dict[str, Any]) -> str:
    kind, example, detail = KINDS[entry["kind"]], entry["example"], entry["detail"]
    rows = f"{entry['rows']:,} row{'s' if entry['rows'] != 1 else ''}"
    several = isinstance(detail, list)
    named = ", ".join(map(repr, detail)) if several else repr(detail) if detail else ""
    shown = f": {example['text']!r}" if example["text"] and not several else ""
    return f"{rows}: {kind.says.format(detail=named)} ({example['source']} row {example['row_number']}{shown}); {kind.advice}"
