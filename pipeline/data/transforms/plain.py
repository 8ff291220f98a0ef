"""Rows of plain text: separation of the prompt, and checks of the answers."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import replace
from functools import lru_cache

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Rendered, RowError, completion_text, pair_text
from pipeline.data.transforms.conversations import is_distinctive
from pipeline.data.transforms.messages import refuse_conversation

__all__ = ["labelled_text", "paired_text", "refuse_other_turns", "split_prompt", "unprompted_pair", "without_prompt"]

TURNS = {
    "Assistant": re.compile(r"(?:^|\r?\n\r?\n)(?:Human|User|Assistant):"),
    "A": re.compile(r"(?:^|\r?\n\r?\n)(?:H|Q|A):"),
    "\nAssistant": re.compile(r"(?:^|\r?\n)(?:Human|User|Assistant):"),
    "\nBot": re.compile(r"(?:^|\r?\n)(?:Human|User|Bot):"),
    "\nA": re.compile(r"(?:^|\r?\n)(?:H|Q):"),
    "ASSISTANT": re.compile(r"(?:^|\s|</s>)USER:"),
    "mark": re.compile(
        r"<\|user\|>|<\|prompter\|>|\[INST\]|### (?:Instruction|Human|User):|<\|im_start\|>user|<start_of_turn>user"
        r"|<\|start_header_id\|>user|<\|USER_TOKEN\|>|<｜User｜>"
    ),
}
"""Answering speaker of a dialogue in plain text, as in Anthropic's HH-RLHF or from a template -> headers of its turns."""
ANSWER_HEADER = re.compile(
    r"(?:^|\r?\n\r?\n)(?P<name>Assistant|A):|\n(?P<line>Assistant|Bot|A):|(?:^|\s)(?P<upper>ASSISTANT):"
    r"|(?P<mark><\|assistant\|>\r?\n?|\[/INST\]"
    r"|### (?:Response|Assistant):|<\|im_start\|>assistant\r?\n|<start_of_turn>model\r?\n|<\|CHATBOT_TOKEN\|>|<｜Assistant｜>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\r?\n\r?\n)"
)
QUESTION_HEADER = re.compile(r"(?:^|\r?\n)(?:H|Q):")
"""Header of a question that an `A:` answers; without one, `A:` may be the first of several choices."""
CHOICE = re.compile(r"\r?\nB[:.)]")
"""The choice that follows an `A:` that is a choice."""
JOINER = "\u200d"
LETTER = r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"
"""A letter of a script that separates words by spaces."""
WORD_CHARACTER = re.compile(LETTER)


def paired_text(prompt: str, chosen: str, rejected: str) -> Rendered:
    """Build a pair of text; a prompt that both answers repeat is removed from them.

    Raises:
        RowError: for an answer that is a conversation, contains another turn of a dialogue, or is empty; for equal answers.
    """
    # Only where both repeat it: one alone may quote the question, which is reported below.
    (chosen, rejected), notes = without_prompt(prompt, chosen, rejected)
    if (chosen.startswith(prompt) or rejected.startswith(prompt)) and is_distinctive(prompt):
        notes.append(Note("answer_echoes_prompt", example=chosen if chosen.startswith(prompt) else rejected))
    elif prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt):
        notes.append(Note("answers_echo_prompt", example=prompt))
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check(prompt, answer, name)
    return replace(pair_text(prompt, chosen, rejected), notes=tuple(notes))


def unprompted_pair(chosen: str, rejected: str) -> Rendered:
    """Build a pair of two texts that begin with the same prompt. Raises RowError as `split_prompt` and `paired_text`."""
    prompt, *answers = split_prompt(chosen, rejected)
    pair = paired_text(prompt, *answers)
    # A header of the answering speaker shows where the prompt ends; any other place is a guess.
    if _last_header(prompt) is not None:
        return pair
    return replace(pair, notes=(*pair.notes, Note("prompt_guessed", example=prompt[-80:])))


def labelled_text(prompt: str, completion: str, label: bool) -> Rendered:
    """Build a labelled completion. Raises RowError as `paired_text`."""
    (completion,), notes = without_prompt(prompt, completion)
    _check(prompt, completion, "completion")
    return replace(completion_text(prompt, completion, label), notes=tuple(notes))


def without_prompt(prompt: str, *answers: str) -> tuple[list[str], list[Note]]:
    """Remove the prompt from answers that all begin with it; returns them, and a note if so."""
    # A short prompt such as "Hi" may begin an answer by chance.
    if all(answer.startswith(prompt) for answer in answers) and is_distinctive(prompt):
        return [answer[len(prompt) :] for answer in answers], [Note("prompt_repeated", example=answers[0])]
    return list(answers), []


def split_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two texts that begin with the same prompt into prompt and answers.

    The answers begin after the last common header of an answering turn; in text without such headers, with the word in which
    they differ (`trl.data_utils.extract_prompt` splits within a word).

    Raises:
        RowError: without a common beginning.
    """
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - by character is what we want
    if (header := _last_header(shared)) is not None:
        end = header.end()
    else:
        is_within_word = any(WORD_CHARACTER.match(text, len(shared)) for text in (chosen, rejected))
        end = _grapheme_start(shared, _word_start(shared) if is_within_word else len(shared.rstrip(" \t")), chosen, rejected)
    if not shared[:end].strip():
        raise RowError("chosen and rejected share no beginning that could be the prompt")
    return shared[:end], chosen[end:], rejected[end:]


# Both answers of a pair are checked against the same prompt.
@lru_cache(maxsize=1)
def _last_header(text: str) -> re.Match[str] | None:
    """Return the last header of an answering turn."""
    found = list(ANSWER_HEADER.finditer(text))
    if not found:
        return None
    question = QUESTION_HEADER.search(text)
    question_start = len(text) if question is None else question.start()
    choices = [match.start() for match in CHOICE.finditer(text)]

    def is_header(match: re.Match[str]) -> bool:
        is_a = "A" in (match["name"], match["line"])
        return not is_a or (match.start() > question_start and not any(at > match.start() for at in choices))

    headers = [match for match in found if is_header(match)]
    return headers[-1] if headers else None


def _word_start(text: str) -> int:
    """Return the start of the word that a text ends in, including the blanks before it."""
    end = len(text)
    while end and WORD_CHARACTER.match(text, end - 1):
        end -= 1
    return len(text[:end].rstrip(" \t"))


def _grapheme_start(shared: str, end: int, *texts: str) -> int:
    """Move `end` back to a grapheme boundary: a letter stays with its marks, an emoji with its skin tone and joined emoji."""
    # Both texts are checked: the mark may follow in one of them only.
    while end and (
        any(end < len(text) and _extends_grapheme(text[end]) for text in texts)
        or (end < len(shared) and shared[end - 1] == JOINER)
    ):
        end -= 1
    return end


def _extends_grapheme(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Mn", "Mc", "Me")
        or character == JOINER
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def _check(prompt: str, answer: str, name: str) -> None:
    if not answer.strip():
        raise RowError(f"{name!r} is empty")
    # Text that is serialised messages would be trained on as it is, with its brackets and quotes.
    refuse_conversation(prompt, "prompt")
    refuse_conversation(answer, name)
    refuse_other_turns(prompt, answer, name)


def refuse_other_turns(prompt: str, answer: str, name: str) -> None:
    """Raise RowError for an answer that contains another turn of the dialogue of its prompt."""
    header = _last_header(prompt)
    if header is None:
        return
    # Only headers of the same dialogue format count: an answer may quote another format.
    kind = "mark" if header["mark"] else header["name"] or header["upper"] or f"\n{header['line']}"
    if (match := TURNS[kind].search(answer)) is not None:
        raise RowError(f"{name!r} holds another turn ({match.group().strip()!r}), and an answer is one turn of the assistant")
