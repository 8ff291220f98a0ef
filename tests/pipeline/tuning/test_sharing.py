"""Which trials share one copy of the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from pipeline.doctor.machine import Machine
from pipeline.errors import ConfigError, UserError
from pipeline.training.sharing import fitting_slots, why_not_shared
from pipeline.tuning import sweep
from pipeline.tuning.sharing import plan_sharing, unused_note
from pipeline.ui.display import SilentDisplay
from tests.tiny import save_tiny

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}


def trial(**keys: Any) -> RunConfig:
    return parse_config({"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, **LORA, **keys})


def full(**keys: Any) -> RunConfig:
    return parse_config({"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rate": 1e-3},
        {"rl": "ipo"},
        {"rl": "simpo"},
        {"rl_beta": 0.5, "weight_decay": 0.1, "seed": 3, "num_epochs": 2},
        {"lora_r": 32, "lora_alpha": 64, "lora_target_modules": ["k_proj", "v_proj"], "lora_dropout": 0.1},
        {"peft_use_dora": True},
        {"peft_use_rslora": True},
        {"sequence_len": 64, "micro_batch_size": 4, "gradient_checkpointing": True},
        {"datasets": [{"path": "other.jsonl"}]},
    ],
)
def test_what_may_differ(keys: dict[str, Any]) -> None:
    assert why_not_shared(trial(**keys), trial()) == []
    assert plan_sharing("auto", [trial(), trial(**keys)]) == plan_sharing(True, [trial(), trial(**keys)])


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (full(), "adapter"),
        (trial(base_model="n"), "base_model"),
        (trial(bf16=False), "bf16"),
        (trial(lora_modules_to_save=["embed_tokens"]), "lora_modules_to_save"),
        (trial(peft_init_lora_weights="pissa"), "peft_init_lora_weights"),
        (trial(chat_template="chatml"), "chat_template"),
        (trial(ray={"num_workers": 2}), "ray.num_workers"),
        (trial(ray={"num_workers": {"min": 1, "max": 2}}), "ray.num_workers"),
        (trial(ray={"resources_per_worker": {"CPU": 2}}), "ray.resources_per_worker"),
    ],
)
def test_what_must_not(other: RunConfig, key: str) -> None:
    assert [name for name, _ in why_not_shared(other, trial())] == [key]
    shared = plan_sharing("auto", [trial(), other, trial(learning_rate=1e-3)])
    assert shared is not None and shared.recipe == trial() and why_not_shared(other, shared.recipe)
    assert len(shared.reasons) == 1 and shared.reasons[0].startswith(f"{key}: ")
    with pytest.raises(ConfigError, match=f"tune.share_base: true, but {key}: "):
        plan_sharing(True, [trial(), other, trial(learning_rate=1e-3)])


def test_a_shared_base_is_divided_by_what_divides_weights() -> None:
    two = {"ray": {"num_workers": 2}}
    assert [key for key, _ in why_not_shared(trial(deepspeed="zero2", **two))] == ["deepspeed"]
    for keys in ({"deepspeed": "zero3"}, {"fsdp_config": {}}):
        assert why_not_shared(trial(**keys, **two), trial(seed=3, **keys, **two)) == []
        assert [key for key, _ in why_not_shared(trial(**keys, **two), trial(**two))] == list(keys)


def test_most_of_the_trials_decide_the_base() -> None:
    shared = plan_sharing("auto", [trial(base_model="n"), trial(), trial(seed=1), full()])
    assert shared is not None and shared.recipe.base_model == "m"
    assert [reason.split(":")[0] for reason in shared.reasons] == ["base_model", "adapter"]


def test_nothing_is_shared_by_one_or_none() -> None:
    assert plan_sharing("auto", [trial(), full()]) is plan_sharing("auto", [full(), full()]) is None
    assert plan_sharing(False, [trial(), trial()]) is None
    with pytest.raises(ConfigError, match="tune.share_base: true, but adapter: not set: it trains the base itself"):
        plan_sharing(True, [full(), full()])


def test_a_single_trial_has_none_to_share_with() -> None:
    note = unused_note(True, plan_sharing(True, [trial()]))
    assert note is not None and note.startswith("tune.share_base: true, but a single trial has no other to share with")
    assert unused_note("auto", plan_sharing("auto", [trial()])) is None
    assert unused_note(True, plan_sharing(True, [trial(), trial(seed=1)])) is None


def test_slots_need_sharing() -> None:
    section = {"space": {"learning_rate": {"grid": [1e-5, 1e-4]}}, "share_base": False, "slots": 4}
    with pytest.raises(ConfigError, match="tune.slots: has no effect with share_base: false; remove it"):
        trial(tune=section)


def test_slots_of_a_sweep_are_those_of_its_most_demanding_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("CPU", 3 * 2**29, 3 * 2**29)
    monkeypatch.setattr(sweep, "this_machine", lambda use_gpu: machine)
    keys: dict[str, Any] = {"base_model": save_tiny(tmp_path / "base"), "sequence_len": 64, "bf16": False}
    space = {"lora_r": {"choice": [8, 8192]}}
    # The first one asks for little; the last one can't share, so it doesn't count.
    recipes = [trial(**keys), trial(**keys, lora_r=8192), full(**keys)]
    fewest = fitting_slots([recipes[1]], 1, machine)
    assert 1 < fewest < fitting_slots([recipes[0]], 1, machine)
    shared = plan_sharing("auto", recipes)
    assert shared is not None
    hosts, at_once = sweep._share(trial(**keys, tune={"space": space}), shared, recipes, 1, 99, SilentDisplay())
    assert (hosts.hosts, hosts.slots, at_once) == (1, fewest, fewest)
    asked = trial(**keys, tune={"space": space, "slots": fewest + 1})
    with pytest.raises(UserError, match=f"tune.slots: {fewest + 1} trials don't fit the memory .*: {fewest} do"):
        sweep._share(asked, shared, recipes, 1, 99, SilentDisplay())
