"""Which reference each strategy has, and that those without one never load one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.planning import check_recipe
from strategies import HFRLTrainerBuilder, TrainDatasetMeta, train
from strategies.config import as_config
from strategies.inference.reference import load_reference, load_reference_alone
from strategies.methods.registry import get_strategy
from tests.tiny import adapter_folder, prepared_labelled, prepared_pairs, save_tiny, tiny_model, tiny_tokenizer

LORA = {"adapter": "lora", "lora_r": 4}


def rows(rl: str, number: int = 8) -> list[dict[str, Any]]:
    return prepared_labelled(number) if rl == "kto" else prepared_pairs(number)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often a model was loaded, by any way there is, and how often one was copied."""
    counts = {"loaded": 0, "copied": 0}
    load, duplicate = PreTrainedModel.from_pretrained.__func__, copy.deepcopy

    def counting_load(cls: type, *args: Any, **kwargs: Any) -> Any:
        counts["loaded"] += 1
        return load(cls, *args, **kwargs)

    def counting_copy(value: Any, *args: Any) -> Any:
        counts["copied"] += isinstance(value, PreTrainedModel)
        return duplicate(value, *args)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting_load))
    monkeypatch.setattr("copy.deepcopy", counting_copy)
    return counts


@pytest.mark.parametrize(
    ("rl", "keys", "loaded", "copied"),
    [
        ("simpo", {}, 1, 0),
        ("orpo", {}, 1, 0),
        ("simpo", LORA, 1, 0),
        ("orpo", LORA, 1, 0),
        ("dpo", {}, 1, 1),
        ("ipo", {}, 1, 1),
        ("kto", {}, 1, 1),
        ("dpo", LORA, 1, 0),
        ("ipo", LORA, 1, 0),
        ("kto", LORA, 1, 0),
        ("dpo", {"reference_model": "other"}, 2, 0),
        ("kto", {"reference_model": "other"}, 2, 0),
        ("kto", {"reference_model": "other", **LORA}, 2, 0),
    ],
)
def test_models_are_loaded_as_often_as_they_are_used(
    config: dict[str, Any], counted: dict[str, int], tmp_path: Path, rl: str, keys: dict[str, Any], loaded: int, copied: int
) -> None:
    given = {"reference_model": save_tiny(tmp_path / "other", seed=1)} if "reference_model" in keys else {}
    _, _, trainer = train({**config, "rl": rl, "max_steps": 1, **keys, **given}, TrainDatasetMeta(rows(rl)))
    assert counted == {"loaded": loaded, "copied": copied}
    own = not given and (bool(keys) or rl in ("simpo", "orpo"))
    assert (trainer.ref_model is None) == own
    assert trainer.rl == rl


@pytest.mark.parametrize("rl", ["simpo", "orpo"])
def test_a_reference_is_refused_where_none_is_used(config: dict[str, Any], rl: str) -> None:
    tokenizer = tiny_tokenizer()
    builder = HFRLTrainerBuilder({**config, "rl": rl}, tiny_model(tokenizer), tokenizer)
    builder.model_ref = tiny_model(tokenizer)
    with pytest.raises(ValueError, match=f"model_ref: rl: {rl} uses no reference model; leave it out"):
        builder.build(1)


@pytest.mark.parametrize(("rl", "adapters"), [("dpo", ["default", "ref"]), ("kto", ["default", "ref"]), ("simpo", ["default"])])
def test_a_continued_adapter_is_its_own_reference(
    build: Callable[..., Any], tmp_path: Path, rl: str, adapters: list[str]
) -> None:
    trainer = build(
        3, rl=rl, train=rows(rl), evaluate=rows(rl, 4), adapter="lora", lora_model_dir=adapter_folder(tmp_path / "a")
    )
    assert isinstance(trainer.model, PeftModel)
    assert list(trainer.model.peft_config) == adapters
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if ".ref." in name}
    assert bool(frozen) == ("ref" in adapters)
    before = trainer.evaluate()
    if frozen:
        # The reference is the adapter as it was loaded, not the base model.
        assert before["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    trainer.train()
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], value) for name, value in frozen.items())
    assert trainer.evaluate()["eval_rewards/margins"] > before["eval_rewards/margins"]


def test_another_reference_is_compared_with(build: Callable[..., Any], tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1)
    for rl in ("dpo", "kto"):
        found = build(1, rl=rl, train=rows(rl), reference_model=other).evaluate(rows(rl, 4))
        assert abs(found["eval_rewards/chosen"]) > 0.01


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_the_reference_follows_the_policy(build: Callable[..., Any], rl: str) -> None:
    """TR-DPO, arXiv 2404.09656: reference = alpha x policy + (1 - alpha) x reference, every so many steps."""
    keys = {
        "rl": rl,
        "train": rows(rl),
        "trl": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2},
    }
    trainer = build(2, **keys)
    start = [param.clone() for param in trainer.model.parameters()]
    trainer.train()
    for old, policy, reference in zip(start, trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.allclose(reference, 0.25 * policy + 0.75 * old, atol=1e-7)
    assert any(not torch.equal(old, now) for old, now in zip(start, trainer.ref_model.parameters(), strict=True))


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_a_resumed_run_goes_on_with_the_reference_that_it_had(build: Callable[..., Any], rl: str) -> None:
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    keys = {"rl": rl, "train": rows(rl), "trl": sync, "save_strategy": None, "save_steps": 3}
    whole, resumed = build(6, **keys), build(6, **keys)
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    for model in ("model", "ref_model"):
        pairs = zip(getattr(whole, model).parameters(), getattr(resumed, model).parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs), model


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({"adapter": "lora"}, "cached"),
        ({}, "live"),
        ({"adapter": "lora", "reference_model": "other"}, "live"),
        ({"adapter": "lora", "lora_model_dir": "adapter"}, "live"),
        ({"adapter": "lora", "peft_init_lora_weights": "olora"}, "live"),
    ],
)
def test_answers_are_generated_by_a_reference_that_is_there(keys: dict[str, Any], mode: str) -> None:
    """Without a reference model, the policy without its adapter answers."""
    cfg = as_config({"base_model": "model", "dpo_generate_during_eval": True, **keys})
    assert get_strategy("dpo").reference_mode(cfg) == mode


def test_the_copy_is_frozen_and_apart(config: dict[str, Any]) -> None:
    from strategies.config import as_config

    model = tiny_model(tiny_tokenizer())
    reference = load_reference(as_config(config), model)
    assert reference is not None
    assert not reference.training
    assert not any(param.requires_grad for param in reference.parameters())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def spoiled(folder: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A tiny model whose tokenizer's file was changed."""
    save_tiny(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return str(folder)


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]


def rename_all(content: dict[str, Any]) -> None:
    content["model"]["vocab"] = {f"{token}{token}": number for token, number in content["model"]["vocab"].items()}


def rename_added(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["content"] = "<|reserved|>"


def add(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "id": 259, "content": "<|more|>"})


@pytest.mark.parametrize("change", [swap, rename_all])
def test_a_reference_of_another_tokenizer_is_refused(tmp_path: Path, tiny_base: str, change: Any) -> None:
    """By the builder, before workers start, and where it is scored."""
    other = spoiled(tmp_path / "other", change)
    cfg = as_config({"base_model": tiny_base, "rl": "dpo", "reference_model": other})
    words = r"reference_model: '.*other' has another tokenizer \(\d+ tokens differ, such as '.+'\)"
    with pytest.raises(ValueError, match=words):
        HFRLTrainerBuilder(cfg, tiny_model(tiny_tokenizer()), tiny_tokenizer()).build(1)
    with pytest.raises(ValueError, match=words):
        load_reference_alone(cfg, tiny_tokenizer())
    with pytest.raises(UserError, match=words):
        check_recipe(parse_config({**cfg.model_dump(exclude_unset=True), "datasets": [{"path": "x.jsonl"}]}))


@pytest.mark.parametrize("change", [rename_added, add])
def test_a_reference_that_reads_the_tokens_is_taken(tmp_path: Path, tiny_base: str, change: Any) -> None:
    """Reserved tokens are given names later, and vocabularies grow."""
    cfg = as_config({"base_model": tiny_base, "rl": "dpo", "reference_model": spoiled(tmp_path / "other", change)})
    assert load_reference_alone(cfg, tiny_tokenizer()) is not None
