"""Assignment of rows to training, evaluation or duplicates, over all rows at once, from their hashes."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

__all__ = ["DUPLICATE", "TO_EVAL", "TO_TRAIN", "decide"]

DUPLICATE, TO_TRAIN, TO_EVAL = 0, 1, 2


def decide(
    hashes: NDArray[np.void],
    prompts: NDArray[np.void],
    is_test: NDArray[np.bool_],
    dedup: bool,
    val_set_size: float,
    seed: int,
) -> NDArray[np.uint8]:
    """Assign each row to `DUPLICATE`, `TO_TRAIN` or `TO_EVAL`. All arrays have shape (rows,), in source order.

    Of equal rows (`hashes`) the first is kept; test sets come after training sets, so they lose rows that are trained on.
    `val_set_size` (a fraction below 1, else a number of rows) takes the rows whose prompts have the smallest hash of seed and
    prompt, so a row's split does not depend on how many rows precede it. Rows with the same prompt (`prompts`) go to the same
    split, so there may be more evaluation rows than `val_set_size`: all those of the last prompt. With hashes of whole rows as
    `prompts` (`split_by: row`), each row is split off by itself.

    Raises:
        UserError: when the evaluation set would leave nothing to train on.
    """
    destination = np.where(is_test, TO_EVAL, TO_TRAIN).astype(np.uint8)
    if dedup and len(hashes):
        duplicate = np.ones(len(hashes), dtype=bool)
        # `return_index` gives the first occurrence.
        duplicate[np.unique(hashes, return_index=True)[1]] = False
        destination[duplicate] = DUPLICATE
    # After deduplication, so that the fraction is of the rows that remain.
    if val_set_size:
        candidates = np.flatnonzero(destination == TO_TRAIN)
        digests = _seeded_hashes(prompts[candidates], seed)
        order = np.argsort(digests, kind="stable")
        # Extended to all rows of the last prompt, which share its digest.
        # A small fraction of few rows still asks for evaluation: one row at least.
        count = int(val_set_size) if val_set_size >= 1 else max(1, round(val_set_size * len(order)))
        if count <= len(order):
            count = int(np.searchsorted(digests[order], digests[order[count - 1]], side="right"))
        if count >= len(order):
            reason = " (rows of one prompt are on one side)" if count > val_set_size >= 1 else ""
            raise UserError(
                f"val_set_size: {val_set_size:g} takes {count} of {len(order)} rows and leaves none to train on{reason}"
            )
        destination[candidates[order[:count]]] = TO_EVAL
    return destination


def _seeded_hashes(prompts: NDArray[np.void], seed: int) -> NDArray[np.uint64]:
    """Hash each prompt's hash with the seed as key. Shape: (prompts,) in and out."""
    key = str(seed).encode()
    # A keyed hash instead of a random generator: each row's side is decided without the others.
    digests = [hashlib.blake2b(prompt.tobytes(), digest_size=8, key=key).digest() for prompt in prompts]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
