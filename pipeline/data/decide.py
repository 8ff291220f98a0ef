"""Which rows train, which evaluate, which are duplicates: decided over all rows at once, from hashes."""

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
    """Where each row goes: `DUPLICATE`, `TO_TRAIN` or `TO_EVAL`. All arrays have shape (rows,), in source order.

    Of equal rows (`hashes`) the first stays; test sets come after training sets, so they lose what was trained on.
    `val_set_size` (a fraction below 1, else a number of rows) takes the rows whose prompts have the smallest hash of seed and
    prompt, so a row's side does not depend on how many come before it. Rows of one prompt (`prompts`) are on one side, so there
    may be more evaluation rows than that, by the last prompt's.

    Raises:
        UserError: when the evaluation set would leave nothing to train on.
    """
    destination = np.where(is_test, TO_EVAL, TO_TRAIN).astype(np.uint8)
    if dedup and len(hashes):
        duplicate = np.ones(len(hashes), dtype=bool)
        duplicate[np.unique(hashes, return_index=True)[1]] = False
        destination[duplicate] = DUPLICATE
    if val_set_size:
        candidates = np.flatnonzero(destination == TO_TRAIN)
        digests = _keyed(prompts[candidates], seed)
        order = np.argsort(digests, kind="stable")
        number = int(val_set_size) if val_set_size >= 1 else max(1, round(val_set_size * len(order)))
        if number <= len(order):
            number = int(np.searchsorted(digests[order], digests[order[number - 1]], side="right"))
        if number >= len(order):
            one = " (rows of one prompt are on one side)" if number > val_set_size >= 1 else ""
            raise UserError(
                f"val_set_size: {val_set_size:g} takes {number} of {len(order)} rows and leaves none to train on{one}"
            )
        destination[candidates[order[:number]]] = TO_EVAL
    return destination


def _keyed(prompts: NDArray[np.void], seed: int) -> NDArray[np.uint64]:
    """A keyed hash of each prompt's hash. Shape: as given."""
    key = str(seed).encode()
    digests = [hashlib.blake2b(prompt.tobytes(), digest_size=8, key=key).digest() for prompt in prompts]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)
