"""What changes the name of a store, and what doesn't."""

from __future__ import annotations

import gzip
import json
import os

import pytest
from transformers import CTRLTokenizer

from pipeline.data.fingerprint import tokenizer_identity
from pipeline.data.plan import make_plan
from pipeline.errors import UserError
from tests.pipeline.data.conftest import make_config, with_bos, write_jsonl
from tests.tiny import pairs, tiny_tokenizer


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "a.jsonl", pairs(9))


@pytest.fixture
def fingerprint(tmp_path, tokenizer):
    def compute(*datasets, use=tokenizer, **changes):
        return make_plan(make_config(tmp_path, *datasets, **changes), use, 2000).fingerprint

    return compute


def test_the_same_twice(file, fingerprint):
    first = fingerprint({"path": str(file)})
    assert first == fingerprint({"path": str(file)})
    assert len(first) == 20 and int(first, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": "kto"},
        {"rl": "grpo"},
        {"sequence_len": 99},
        {"excess_length_strategy": "truncate"},
        {"dataset_exact_deduplication": True},
        {"val_set_size": 0.1},
        {"encode_special_tokens": False},
    ],
)
def test_keys_that_change_the_bytes(file, fingerprint, changes):
    assert fingerprint({"path": str(file)}) != fingerprint({"path": str(file)}, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": "ipo"},
        {"rl": "simpo"},
        {"rl": "orpo"},
        {"learning_rate": 1.0},
        {"rl_beta": 2.0},
        {"output_dir": "elsewhere"},
        {"dataset_num_proc": 1},
        {"max_rejected_fraction": 0.5},
        {"seed": 8},
        {"dataset_prepared_path": "elsewhere"},
    ],
)
def test_keys_that_do_not(file, fingerprint, changes):
    assert fingerprint({"path": str(file)}) == fingerprint({"path": str(file)}, **changes)


def test_keys_that_are_false_are_not_set(file, fingerprint):
    first = fingerprint({"path": str(file)}, rl="kto")
    assert first == fingerprint({"path": str(file), "split_pairs": False}, rl="kto")
    assert first != fingerprint({"path": str(file), "split_pairs": True}, rl="kto")


def test_the_seed_counts_where_a_split_is_made(file, fingerprint):
    split = {"val_set_size": 0.2}
    assert fingerprint({"path": str(file)}, seed=1, **split) != fingerprint({"path": str(file)}, seed=2, **split)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "chatml.prompt_pairs"},
        {"type": {"prompt_format": "{prompt}:"}},
        {"split": "train[:5]"},
        {"chat_template": "qwen3"},
        {"chat_template_jinja": "{{ 1 }}"},
        {"field_chosen": "rejected"},
        {"ds_type": "jsonl"},
        {"roles": {"user": ["u"]}},
    ],
)
def test_keys_of_a_dataset(file, fingerprint, changes):
    assert fingerprint({"path": str(file)}) != fingerprint({"path": str(file), **changes})


def test_the_bytes_of_a_source_count_and_its_times_do_not(tmp_path, file, fingerprint):
    first = fingerprint({"path": str(file)})
    os.utime(file, (1, 1))
    assert first == fingerprint({"path": str(file)})
    file.write_text(file.read_text().replace("What is 8", "What is 9"))
    assert first != fingerprint({"path": str(file)})


def test_the_bytes_of_a_compressed_source_count(tmp_path, fingerprint):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n', mtime=0))
    first = fingerprint({"path": str(path)})
    path.write_bytes(gzip.compress(b'{"a": 2}\n', mtime=0))
    assert first != fingerprint({"path": str(path)})


def test_order_and_role_of_sources(tmp_path, file, fingerprint):
    other = write_jsonl(tmp_path / "b.jsonl", pairs(3))
    both = fingerprint({"path": str(file)}, {"path": str(other)})
    assert both != fingerprint({"path": str(other)}, {"path": str(file)})
    assert both != fingerprint({"path": str(file)}, test_datasets=[{"path": str(other)}])


def test_the_tokenizer(file, fingerprint):
    def after(change):
        made = tiny_tokenizer()
        change(made)
        return fingerprint({"path": str(file)}, use=made)

    first = after(lambda tokenizer: None)
    assert first == after(lambda tokenizer: tokenizer(["a", "bb"], padding=True, truncation=True, max_length=1))
    assert first != after(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ 1 }}"))
    assert first != after(lambda tokenizer: tokenizer.add_tokens(["<new>"]))
    assert first != after(lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|pad|>"}))
    assert first != after(with_bos)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"path": "nothing.jsonl"}, r"datasets\[1\].path: no such file"),
        ({"type": "chatml.nope"}, r"datasets\[1\].type: no dataset type 'chatml.nope'"),
        ({"chat_template": "nope"}, r"datasets\[1\].chat_template: unknown template 'nope'"),
        ({"split_pairs": True}, r"datasets\[1\].split_pairs: has no effect with rl: dpo"),
        ({"split": "train[a:b]"}, r"datasets\[1\].split: got 'train\[a:b\]'"),
    ],
)
def test_messages_name_the_dataset(file, fingerprint, dataset, message):
    with pytest.raises(UserError, match=message):
        fingerprint({"path": str(file)}, {"path": str(file), **dataset})


def test_no_datasets_and_a_bad_strategy(file, fingerprint):
    with pytest.raises(UserError, match="datasets: must name one dataset at least"):
        fingerprint()
    with pytest.raises(UserError, match="excess_length_strategy: must be one of drop, truncate, raise, got 'cut'"):
        fingerprint({"path": str(file)}, excess_length_strategy="cut")
    with pytest.raises(UserError, match="^rl: unknown value 'ppo'; available: dpo, ipo, simpo, orpo, kto, grpo"):
        fingerprint({"path": str(file)}, rl="ppo")


def test_switches_of_the_tokenizer_count(tokenizer):
    """Of its config, and whatever it is loaded with; but not how ids become text again."""
    before = tokenizer_identity(tokenizer)
    for changes in ({"split_special_tokens": True}, {"add_eos_token": True}):
        other = tiny_tokenizer()
        other.init_kwargs |= changes
        for name, value in changes.items():
            setattr(other, name, value)
        assert tokenizer_identity(other) != before, changes
    cleaning = tiny_tokenizer()
    cleaning.init_kwargs["clean_up_tokenization_spaces"] = cleaning.clean_up_tokenization_spaces = True
    assert tokenizer_identity(cleaning) == before


def test_merges_of_a_tokenizer_without_a_backend_count(tmp_path):
    """The vocabulary is the same, and the ids of a text aren't."""
    found = []
    for name, merges in (("one", "a b\nab c"), ("other", "b c\na bc")):
        folder = tmp_path / name
        folder.mkdir()
        vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "<|endoftext|>": 6}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        tokenizer = CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>")
        assert getattr(tokenizer, "backend_tokenizer", None) is None
        found.append(tokenizer_identity(tokenizer))
    assert found[0] != found[1]
