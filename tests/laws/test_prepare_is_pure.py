"""Law 8: prepare is a pure function. Workers, blocks and the order in which tasks end change nothing."""

from __future__ import annotations

import random

import pytest

from pipeline.data import prepare
from pipeline.ray.tasks import run_here
from tests.pipeline.data.conftest import make_config, write_jsonl
from tests.tiny import pairs, tiny_tokenizer

KINDS = {"pair": ({}, {}), "halves of pairs": ({"rl": "kto"}, {"split_pairs": True}), "prompt": ({"rl": "grpo"}, {})}
"""What rows there are -> keys of the config, and of the dataset."""


def contents(prepared):
    files = {path.relative_to(prepared.path): path.read_bytes() for path in [*prepared.train_files(), *prepared.eval_files()]}
    return prepared.fingerprint, files, prepared.manifest


@pytest.fixture
def config(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(120) + pairs(30))

    def make(store, kind="pair", **changes):
        method, dataset = KINDS[kind]
        keys = {"dataset_exact_deduplication": True, "val_set_size": 0.1, **method, **changes}
        return make_config(tmp_path / store, {"path": str(path), **dataset}, **keys)

    return make


@pytest.mark.usefixtures("ray_session")
def test_same_bytes_for_any_number_of_workers(config):
    one = prepare(config("one", dataset_num_proc=1), tiny_tokenizer(), rows_per_part=10)
    two = prepare(config("two"), tiny_tokenizer(), rows_per_part=10)
    here = prepare(config("here"), tiny_tokenizer(), rows_per_part=10, executor=run_here)
    assert contents(one) == contents(two) == contents(here)
    assert (one.train_rows, one.eval_rows) == (108, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_for_any_order_of_tasks(config, kind):
    results = []
    for seed in (None, 1, 2):

        def in_some_order(work, job, number, num_proc=None, seed=seed):
            order = list(range(number))
            if seed is not None:
                random.Random(seed).shuffle(order)
            for index in order:
                yield from work(job, index)

        cfg = config(f"order-{seed}", kind)
        results.append(contents(prepare(cfg, tiny_tokenizer(), rows_per_part=10, executor=in_some_order)))
    assert results[0] == results[1] == results[2]
