"""The tables for those who come from another tool name keys and arguments that exist, and defaults that are true."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, ScriptArguments
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

from pipeline.config import RunConfig
from pipeline.config.axolotl import NEUTRAL_KEYS, REASONS, RENAMED
from pipeline.data.dataset_keys import DatasetConfig
from strategies.methods.trl_keys import TRLKeys
from tests.docs.blocks import ROOT

TRL = (DPOConfig, KTOConfig, GRPOConfig, CPOConfig, ORPOConfig, ModelConfig, ScriptArguments)
TRANSLATED = ("precompute_ref_log_probs", "fsdp", "fsdp_version", "sdp_attention", "eager_attention")
"""Keys of Axolotl's that become ours by more than a name."""
OURS = {*RunConfig.model_fields, *DatasetConfig.model_fields, *TRLKeys.model_fields, "split_pairs"}


def tables(page: str) -> Iterator[tuple[str, str]]:
    """Rows of the tables whose head is a tool and prefray."""
    text = (ROOT / "docs" / f"from-{page}.md").read_text()
    for table in re.findall(r"^\| [\w-]+ \| prefray \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE):
        for line in table.splitlines():
            theirs, ours = line.strip("| ").split(" | ")
            yield theirs, ours


def words(cell: str) -> Iterator[str]:
    """The keys in a cell: code, without values and commands."""
    for code in re.findall(r"`([^`]+)`", cell):
        if not code.startswith(("prefray", "axolotl")):
            yield code.split(":")[0]


@pytest.mark.parametrize("page", ["axolotl", "trl", "llama-factory"])
def test_what_is_ours_exists(page: str) -> None:
    rows = list(tables(page))
    assert len(rows) > 10
    for _, ours in rows:
        for word in words(ours):
            section, _, last = word.rpartition(".")
            assert word in OURS or (section in OURS and last), word


def test_what_is_trls_exists() -> None:
    known = {field.name for config in TRL for field in dataclasses.fields(config)}
    for theirs, _ in tables("trl"):
        assert set(words(theirs)) <= known, theirs


def test_what_is_written_otherwise_is_refused_with_the_same_advice() -> None:
    for theirs, ours in tables("axolotl"):
        for word in words(theirs):
            assert word in {*RunConfig.model_fields, *REASONS, *NEUTRAL_KEYS, *RENAMED, *TRANSLATED}, word
            assert RENAMED.get(word, ours.strip("`")) in ours
            if (advice := set(words(REASONS.get(word, "")))) and (written := set(words(ours))):
                assert written & advice, (word, ours, REASONS[word])


def test_the_defaults_of_trl() -> None:
    def default(config: type, name: str) -> object:
        field = next(one for one in dataclasses.fields(config) if one.name == name)
        return field.default

    expected = {
        DPOConfig: {"learning_rate": 1e-6, "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "save_steps": 500}
        | {"gradient_checkpointing": True, "save_total_limit": None, "lr_scheduler_type": "linear", "warmup_steps": 0},
        CPOConfig: {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5},
        ModelConfig: {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        GRPOConfig: {"disable_dropout": False},
    }
    for config, values in expected.items():
        assert {name: default(config, name) for name in values} == values


def test_the_defaults_of_ours() -> None:
    expected = {"learning_rate": 5e-6, "micro_batch_size": 1, "num_epochs": 1.0, "lr_scheduler": "cosine"}
    expected |= {"gradient_checkpointing": False, "save_total_limit": 4, "eval_on_start": False, "disable_dropout": True}
    assert {name: RunConfig.model_fields[name].default for name in expected} == expected
