"""Tokenizers and configs for the data tests."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors

from pipeline.data import prepare
from pipeline.ray.tasks import run_here
from tests.tiny import tiny_tokenizer

prepare_here = partial(prepare, executor=run_here)
"""Prepares without Ray: what a row becomes doesn't depend on who runs the tasks, as law 8 says."""
SHARED_DATA = Path(__file__).parents[4] / "shared" / "data"


def with_bos(tokenizer: Any) -> Any:
    """The tiny tokenizer with `<s>` put before plain text, as Llama's does."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return with_bos(tiny_tokenizer())


def make_config(folder: Path, *datasets: dict[str, Any], **changes: Any) -> SimpleNamespace:
    """A config with the keys that prepare reads; the store goes to `folder`/prepared."""
    defaults = {
        "rl": "dpo",
        "datasets": list(datasets),
        "test_datasets": None,
        "val_set_size": 0.0,
        "split_by": "prompt",
        "split_seed": None,
        "sequence_len": 2048,
        "excess_length_strategy": "drop",
        "dataset_exact_deduplication": False,
        "dataset_prepared_path": str(folder / "prepared"),
        "max_rejected_fraction": 0.01,
        "seed": 7,
        "dataset_num_proc": None,
        "encode_special_tokens": True,
        "template_date": None,
    }
    return SimpleNamespace(**{**defaults, **changes})


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
