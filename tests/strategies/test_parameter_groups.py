"""Which parameter learns how fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from strategies.mixins.optimizer import GroupRates, parameter_groups
from tests.tiny import tiny_model, tiny_tokenizer


def rates_by_name(model: torch.nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)]: group["lr"] for group in groups for param in group["params"]}


@pytest.fixture
def model() -> Any:
    return tiny_model(tiny_tokenizer())


def test_groups_by_name_embedding_and_decay(model: Any) -> None:
    named = [("attention", ("q_proj", "k_proj"), 1e-4)]
    rates = GroupRates(base=1e-3, weight_decay=0.1, named=named, embedding=1e-5)
    decay = {name for name, _ in model.named_parameters() if "norm" not in name}
    groups = {group["name"]: group for group in parameter_groups(model, decay, rates)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "attention": (1e-4, 0.1),
        "base": (1e-3, 0.1),
        "base_no_decay": (1e-3, 0.0),
        "embeddings_no_decay": (1e-5, 0.0),
    }
    assert len(groups["attention"]["params"]) == 4
    # input embedding and output head
    assert len(groups["embeddings_no_decay"]["params"]) == 2
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_loraplus_is_pefts(model: Any) -> None:
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2))
    theirs = create_loraplus_optimizer(policy, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = GroupRates(base=1e-3, loraplus_ratio=16.0)
    ours = rates_by_name(policy, parameter_groups(policy, set(), rates))
    assert ours == pytest.approx(rates_by_name(policy, theirs.param_groups))
    assert sorted(set(ours.values())) == pytest.approx([1e-6, 1e-3, 16e-3])


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            GroupRates(1e-3, named=[("heads", ("q_prj",), 1e-4)]),
            r"lr_groups\.0\.modules: 'q_prj' \(group 'heads'\) is part of no",
        ),
        (GroupRates(1e-3, loraplus_ratio=4.0), "loraplus_lr_ratio: the model has no LoRA adapter"),
    ],
)
def test_rates_that_match_nothing_are_errors(model: Any, rates: GroupRates, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, set(), rates)


def test_embedding_lr_without_a_trained_embedding_is_an_error(model: Any) -> None:
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="embedding_lr: the model trains no embedding"):
        parameter_groups(policy, set(), GroupRates(1e-3, embedding=1e-5))


def test_the_trainer_uses_the_groups(build: Callable[..., Any]) -> None:
    trainer = build(
        2, adapter="lora", loraplus_lr_ratio=8.0, lr_groups=[{"name": "down", "modules": ["down_proj"], "lr": 1e-5}]
    )
    optimizer = trainer.create_optimizer()
    assert {group["name"].removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"down": 1e-5, "base": 1e-3, "lora_B": 8e-3}
    )


def test_embedding_scale_is_a_multiple(build: Callable[..., Any]) -> None:
    optimizer = build(2, embedding_lr_scale=0.1).create_optimizer()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["embeddings_no_decay"] == pytest.approx(1e-4)


def test_an_optimizer_class_may_be_given(build: Callable[..., Any], config: dict[str, Any], tmp_path: Any) -> None:
    from strategies.trainers.pair import AxolotlDPOTrainer

    tokenizer = tiny_tokenizer()
    args = build(1).args
    trainer = AxolotlDPOTrainer(
        model=tiny_model(tokenizer),
        ref_model=tiny_model(tokenizer),
        args=args,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.5
