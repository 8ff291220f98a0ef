"""Rows of plain text: where the prompt ends, and what an answer may hold."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Rendered, RowError, completion_text, pair_text
from pipeline.data.transforms.conversations import FEW_WORDS
from pipeline.data.transforms.messages import refuse_conversation

__all__ = ["labelled_text", "paired_text", "split_prompt"]

TURNS = {
    "Assistant": re.compile(r"(?:^|\n\n)(?:Human|User|Assistant):"),
    "A": re.compile(r"(?:^|\n\n)(?:H|A):"),
}
"""Who answers in a dialogue that is written as text, as in Anthropic's HH-RLHF -> headers of its turns."""
ANSWERER = re.compile(r"(?:^|\n\n)(Assistant|A):")
LETTER = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"
"""Of a script that puts spaces between words."""
WORD_SIGN, WORD, SPACE = re.compile(LETTER), re.compile(rf"[ \t]*{LETTER}*$"), re.compile(r"[ \t]+$")


def paired_text(prompt: str, chosen: str, rejected: str) -> Rendered:
    """A pair of text. Answers that begin with the prompt have it once.

    Raises:
        RowError: for an answer that is a conversation, holds another turn of a dialogue, or is empty; for equal answers.
    """
    notes = []
    if chosen.startswith(prompt) and rejected.startswith(prompt) and _is_telling(prompt):
        notes.append(Note("prompt_repeated", example=chosen))
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif (chosen.startswith(prompt) or rejected.startswith(prompt)) and _is_telling(prompt):
        notes.append(Note("answer_echoes_prompt", example=chosen if chosen.startswith(prompt) else rejected))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check(prompt, answer, name)
    return replace(pair_text(prompt, chosen, rejected), notes=tuple(notes))


def labelled_text(prompt: str, completion: str, label: bool) -> Rendered:
    """A labelled answer, as `paired_text`."""
    notes = []
    if completion.startswith(prompt) and _is_telling(prompt):
        notes.append(Note("prompt_repeated", example=completion))
        completion = completion[len(prompt) :]
    _check(prompt, completion, "completion")
    return replace(completion_text(prompt, completion, label), notes=tuple(notes))


def split_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and answers of two texts that begin with the same prompt.

    The answers begin after the last header of the answering turn that both share; in text without such headers, with the
    word in which they differ (`trl.data_utils.extract_prompt` splits within a word).

    Raises:
        RowError: for no common beginning.
    """
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - by character is what we want
    headers = list(ANSWERER.finditer(shared))
    if headers:
        end = headers[-1].end()
    else:
        inside = any(WORD_SIGN.match(text, len(shared)) for text in (chosen, rejected))
        cut = WORD if inside else SPACE
        found = cut.search(shared)
        end = found.start() if found else len(shared)
    if not shared[:end].strip():
        raise RowError("chosen and rejected share no beginning that could be the prompt")
    return shared[:end], chosen[end:], rejected[end:]


def _is_telling(prompt: str) -> bool:
    return "\n" in prompt or len(prompt.split()) >= FEW_WORDS


def _check(prompt: str, answer: str, name: str) -> None:
    if not answer.strip():
        raise RowError(f"{name!r} is empty")
    refuse_conversation(prompt, "prompt")
    refuse_conversation(answer, name)
    headers = ANSWERER.findall(prompt)
    if headers and (found := TURNS[headers[-1]].search(answer)) is not None:
        raise RowError(f"{name!r} holds another turn ({found.group().strip()!r}), and an answer is one turn of the assistant")
