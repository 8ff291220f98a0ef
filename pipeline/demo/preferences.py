"""A preference set that a program can check: answer in one short sentence.

Every pair asks an everyday question; the chosen answer is one sentence of a few words, the rejected one says the same
and then goes on. `is_brief` decides for any answer whether it follows the preference, so the
effect of training on it can be measured. Held-out questions are about other subjects than the training questions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.demo.facts import FACTS

__all__ = ["OPENING", "follows_preference", "held_out_prompts", "preference_pairs", "write_preferences"]

HELD_OUT_PART = 0.2
SEED = 17

OPENING = "In short,"
REJECTED_OPENINGS = ("", "", "Well, ", "I think that ", "The answer is that ", "It is known that ")


def follows_preference(answer: str) -> bool:
    """Whether `answer` opens with the words that the chosen answers open with."""
    return answer.lstrip().startswith(OPENING)


def preference_pairs(held_out: bool, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Yield conversational pairs `{"prompt": [...], "chosen": [...], "rejected": [...]}`, the same for the same seed."""
    rng = random.Random(f"{seed}-{held_out}")
    for question, answer in _split(held_out, seed):
        rejected = rng.choice(REJECTED_OPENINGS) + answer
        yield {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": f"{OPENING} {answer}"}],
            "rejected": [{"role": "assistant", "content": rejected[0].upper() + rejected[1:]}],
        }


def held_out_prompts(seed: int = SEED) -> list[str]:
    """Questions that no training pair asks, about subjects that no training pair mentions."""
    return [question for question, _ in _split(True, seed)]


def write_preferences(folder: Path, seed: int = SEED) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl` into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.jsonl", folder / "held_out.jsonl")
    for path, held_out in zip(paths, (False, True), strict=True):
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in preference_pairs(held_out, seed))
        path.write_text("".join(lines))
    return paths


def _split(held_out: bool, seed: int) -> list[tuple[str, str]]:
    """Questions and answers of one side; the split is by subject, so that no subject is on both."""
    rng = random.Random(seed)
    rows = []
    for kind in FACTS:
        subjects = sorted(kind.facts)
        rng.shuffle(subjects)
        cut = round(len(subjects) * HELD_OUT_PART)
        for subject in subjects[:cut] if held_out else subjects[cut:]:
            answer = kind.answer.format(subject=subject, fact=kind.facts[subject])
            rows += [(question.format(subject=subject), answer) for question in kind.questions]
    rng.shuffle(rows)
    return rows
