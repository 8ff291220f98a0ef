"""Tokens of prompt, chosen and rejected, shape (pairs, 3): log-normal ones, and those of real pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from pipeline.data.tokenize import tokenise
from pipeline.data.transforms import load_transform
from strategies.config import as_config
from strategies.models.tokenizer import load_tokenizer

__all__ = ["SIGMA", "TOKENS", "log_normal", "real"]

Lengths = NDArray[np.int64]

TOKENS = 700
"""Mean tokens of a pair: of its prompt and both answers."""
SIGMA = 0.6
"""Standard deviation of the logarithm of a pair's tokens."""
SHARES = (3.0, 4.0, 4.0)
"""Of prompt, chosen and rejected: parameters of a Dirichlet distribution, so that a pair's answers differ in length."""
FEWEST = 12


def log_normal(pairs: int, tokens: float = TOKENS, sigma: float = SIGMA, seed: int = 0) -> Lengths:
    """Draw pairs whose tokens are log-normal with mean `tokens`; the same ones for the same arguments."""
    rng = np.random.default_rng(seed)
    # Half of the variance below the logarithm of the mean: a log-normal's mean lies above its median.
    sizes = rng.lognormal(np.log(tokens) - sigma**2 / 2, sigma, pairs)
    drawn = np.maximum(sizes, FEWEST)[:, None] * rng.dirichlet(SHARES, pairs)
    return np.maximum(drawn.astype(np.int64), 1)


def real(file: Path, model: str) -> Lengths:
    """Return the lengths of all pairs of a file such as `common.DATA`, by the tokenizer of `model`."""
    tokenizer = load_tokenizer(as_config({"base_model": model, "rl": "dpo"}))
    transform = load_transform(tokenizer=tokenizer, **common.SHAPE)
    rows = tokenise([transform.render(row) for row in json.loads(file.read_text(encoding="utf-8"))], tokenizer)
    return np.array([[len(row.prompt), *map(len, row.completions)] for row in rows])
