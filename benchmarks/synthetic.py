"""Pairs of made-up words, a model and a tokenizer for them, and reference scores from a stand-in for the model."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.lengths import log_normal
from pipeline.data import Prepared
from pipeline.io.storage import Folder
from pipeline.reference.score_files import Task, read_rows, write_scores

__all__ = ["PAIRS_PER_FILE", "save_model", "stage_scores", "write_pairs"]

SYLLABLES = [f"{consonant}{vowel}" for consonant, vowel in itertools.product("bdfgklmnprstv", "aeiou")]
WORDS = [f"{first}{second}" for first, second in itertools.product(SYLLABLES, SYLLABLES)]
"""Each of four letters, and one token."""
SPECIAL = ("<pad>", "<end>", "<unknown>")
LOGP = -np.log(len(SPECIAL) + len(WORDS))
"""What the model of `save_model` gives every token."""
PAIRS_PER_FILE = 20_000
POOL = 1 << 18
"""Words of the text of which every prompt and answer is a slice."""


def save_model(folder: Path, positions: int) -> None:
    """Write a Llama of two layers and width 32, and a tokenizer of a token a word.

    Its weights are random except for those of the head, which are 0: it gives every token the same probability.
    """
    # Here, since tasks that write pairs don't need them.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import tiny_model

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    size = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": positions}
    model = tiny_model(tokenizer, **size, tie_word_embeddings=False)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(folder: Path, number: int, pairs: int) -> None:
    """Write file `number` of pairs; log-normal in their lengths, the same for the same number."""
    rng = np.random.default_rng(0)
    text = " ".join(np.array(WORDS)[rng.integers(len(WORDS), size=POOL)])
    lengths = log_normal(pairs, seed=number)
    starts = np.random.default_rng(number).integers(POOL - lengths.max(), size=lengths.shape)
    # A word and the blank after it take five characters.
    columns = {
        name: [
            text[5 * start : 5 * (start + words) - 1] for start, words in zip(starts[:, index], lengths[:, index], strict=True)
        ]
        for index, name in enumerate(("prompt", "chosen", "rejected"))
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"pairs-{number:05d}.parquet", row_group_size=2_000)


def stage_scores(prepared: Prepared, staging: Folder, parts: dict[str, int]) -> None:
    """Stage scores of prepared parts (name -> rows) as an actor does, without running the model: they are `LOGP`."""
    for part, rows in parts.items():
        table = read_rows(prepared, part)
        lengths = zip(*(pc.list_value_length(table[name]).to_pylist() for name in ("chosen_ids", "rejected_ids")), strict=True)
        logps = [tuple(np.full(tokens, LOGP, np.float32) for tokens in pair) for pair in lengths]
        write_scores(staging, Task(part, 0, rows).staged, table, logps, forwards=0)
