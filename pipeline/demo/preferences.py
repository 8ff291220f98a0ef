"""A preference that a program can check: answers open with `OPENING`.

Every pair asks an everyday question; the chosen answer opens with `OPENING`, the rejected one with other words or none.
`follows_preference` checks any answer, so the effect of training can be measured. Held-out questions are about other subjects
than the training questions.
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
# Often none, so that the pairs differ in the opening alone.
REJECTED_OPENINGS = ("", "", "Well, ", "I think that ", "The answer is that ", "It is known that ")


def follows_preference(answer: str) -> bool:
    """Return whether `answer` opens as the chosen answers do."""
    return answer.lstrip().startswith(OPENING)


def preference_pairs(held_out: bool, seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Yield conversational pairs `{"prompt": [...], "chosen": [...], "rejected": [...]}`, determined by the seed."""
    # A seed for each split, or both would draw the same openings.
    rng = random.Random(f"{seed}-{held_out}")
    for question, answer in _split(held_out, seed):
        rejected = rng.choice(REJECTED_OPENINGS) + answer
        yield {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": f"{OPENING} {answer}"}],
            "rejected": [{"role": "assistant", "content": rejected[0].upper() + rejected[1:]}],
        }


def held_out_prompts(seed: int = SEED) -> list[str]:
    """Return questions about subjects that no training pair mentions."""
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
    """Return questions and answers of one split; each subject is in one split only."""
    rng = random.Random(seed)
    rows = []
    for kind in FACTS:
        # Both splits are cut from the same order, which the seed alone decides.
        subjects = sorted(kind.facts)
        rng.shuffle(subjects)
        cut = round(len(subjects) * HELD_OUT_PART)
        for subject in subjects[:cut] if held_out else subjects[cut:]:
            answer = kind.answer.format(subject=subject, fact=kind.facts[subject])
            rows += [(question.format(subject=subject), answer) for question in kind.questions]
    rng.shuffle(rows)
    return rows
