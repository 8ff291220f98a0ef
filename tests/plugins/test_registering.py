"""What may be registered, what is refused, and that registered names work like those that are built in."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pipeline import register_dataset_type
from pipeline.config import config_class, parse_config
from pipeline.config.tuning import perturbable
from pipeline.data.transforms import load_transform
from pipeline.errors import ConfigError
from pipeline.tuning.space import check_trials, corners
from strategies import DPOStrategy, HFRLTrainerBuilder, Keys, key, register_callback, register_loss, register_strategy
from strategies.callbacks import registered_callbacks
from strategies.config import as_config
from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps
from strategies.methods.registry import STRATEGIES
from strategies.outside import OutsideError, RegistrationError
from tests.tiny import pairs, tiny_model, tiny_tokenizer

RECIPE = {"base_model": "model", "datasets": [{"path": "pairs.jsonl"}]}


def flat(policy: Any, reference: Any, options: Any) -> torch.Tensor:
    return policy.chosen - policy.rejected


def other(policy: Any, reference: Any, options: Any) -> torch.Tensor:
    return policy.rejected


def strategy(name: str = "mine", **attributes: Any) -> Any:
    declared = {"keys": DPOStrategy.keys, "requires_reference": True, "batch_kind": "pair", "best_metric": "eval_loss"}
    return type("Mine", (DPOStrategy,), {"rl": name, **declared, **attributes})


class MarginKeys(Keys):
    my_margin: float | None = key("A margin.", ge=0)


class ShiftKeys(Keys):
    my_shift: float = key("A shift.", 0.5, option="shift")
    my_scale: float | None = key("A scale.", option="scale", gt=0)


def logps() -> PairLogps:
    lengths = torch.tensor([5.0, 7.0])
    return PairLogps(torch.tensor([-10.0, -9.0]), torch.tensor([-14.0, -9.5]), lengths, lengths)


def test_a_loss_is_a_value_of_dpo_loss_type() -> None:
    register_loss("flat", flat, reads=())
    assert parse_config({**RECIPE, "dpo_loss_type": ["flat", "sigmoid"]}).dpo_loss_type == ["flat", "sigmoid"]
    assert PAIR_LOSSES["flat"](logps(), logps(), LossOptions()).tolist() == [4.0, 0.5]
    with pytest.raises(ConfigError, match="dpo_loss_type.0: unknown loss 'flut'; available: sigmoid, .*, flat"):
        parse_config({**RECIPE, "dpo_loss_type": "flut"})


def test_traits_of_a_loss_decide_which_keys_have_an_effect() -> None:
    register_loss("flat", flat, reads=["beta"], lengths=True, couples=True)
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {**RECIPE, "dpo_loss_type": "flat", "dpo_label_smoothing": 0.1, "dpo_norm_loss": True, "dpo_use_weighting": 1}
        )
    problems = dict(caught.value.problems)
    assert "has no effect with dpo_loss_type: flat; it is read by sigmoid" in problems["dpo_label_smoothing"]
    assert "flat averages over the tokens itself" in problems["dpo_norm_loss"]
    assert "can't weight the pairs of flat, which sort the batch" in problems["dpo_use_weighting"]


def test_a_sweep_may_choose_it() -> None:
    register_loss("flat", flat)
    register_strategy(strategy(keys=DPOStrategy.keys | {"my_margin"}), keys=MarginKeys)
    space = {"dpo_loss_type": {"choice": ["flat", "hinge"]}, "my_margin": {"uniform": [0, 1], "when": {"rl": "mine"}}}
    cfg = parse_config({**RECIPE, "val_set_size": 2, "tune": {"space": {"rl": {"choice": ["dpo", "mine"]}, **space}}})
    assert cfg.tune is not None
    found = {(recipe.rl, *(recipe.dpo_loss_type or [])) for recipe in check_trials(cfg, corners(cfg.tune))}
    assert found == {(rl, loss) for rl in ("dpo", "mine") for loss in ("flat", "hinge")}
    assert "my_margin" in perturbable()


@pytest.mark.parametrize("register", [partial(register_loss, "flat", flat), partial(register_callback, TrainerCallback)])
def test_the_same_object_may_come_twice(register: Any) -> None:
    register()
    register()


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_loss("hinge", flat), "loss 'hinge' is built in; give yours another name"),
        (lambda: register_loss("simpo", flat), "loss 'simpo' is built in"),
        (
            lambda: [register_loss("a", flat), register_loss("a", other)],
            r"loss 'a' is registered twice, by .*\.flat and by .*\.other",
        ),
        (
            lambda: register_loss("a", flat, reads=["temperature"]),
            "reads names temperature, which no loss has; there are beta, ",
        ),
        (lambda: register_loss("a b", flat), "loss 'a b': a name is a letter, then letters"),
        (lambda: register_loss("a", 3), "loss 'a': give a function or a class, got int"),  # type: ignore[arg-type]
        (lambda: register_strategy(strategy("dpo")), "strategy 'dpo' is built in"),
        (lambda: register_strategy(int), "must be a class of strategies.methods.base.Strategy"),  # type: ignore[arg-type]
        (
            lambda: register_strategy(type("Bare", (STRATEGIES["kto"].__base__,), {"rl": "bare"})),
            "Bare: lacks keys, requires_ref",
        ),
        (lambda: register_strategy(strategy(), keys=MarginKeys), "doesn't read its own key 'my_margin'; add it to"),
        (lambda: register_callback(3), "callback 3: give a class of TrainerCallback, or a function"),  # type: ignore[arg-type]
        (lambda: register_dataset_type("chatml.intel", flat), "dataset type 'chatml.intel' is built in"),  # type: ignore[arg-type]
        (lambda: register_dataset_type("a", flat, kind="triple"), "kind must be one of pair, unpaired, prompt, got 'triple'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_refused(register: Any, message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        register()


def test_a_strategy_that_reads_what_is_no_key() -> None:
    register_strategy(strategy(keys={"my_margin"}))
    with pytest.raises(ConfigError, match="reads 'my_margin', which is no key; declare it"):
        parse_config(RECIPE)
    assert parse_config(RECIPE).rl == "dpo"  # which isn't its fault


def test_keys_of_a_strategy_need_defaults() -> None:
    class Required(Keys):
        my_margin: float

    with pytest.raises(RegistrationError, match="its key 'my_margin' needs a default, which may be None"):
        register_strategy(strategy(keys={"my_margin"}), keys=Required)


def test_a_strategy_brings_its_keys() -> None:
    register_strategy(strategy(keys=DPOStrategy.keys | {"my_margin"}), keys=MarginKeys)
    assert parse_config({**RECIPE, "rl": "mine", "my_margin": 0.5}).my_margin == 0.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"my_margin: has no effect with rl: dpo \(it belongs to rl: mine\); remove it"):
        parse_config({**RECIPE, "my_margin": 0.5})
    with pytest.raises(ConfigError, match="my_margim: unknown key; did you mean 'my_margin'"):
        parse_config({**RECIPE, "rl": "mine", "my_margim": 0.5})
    with pytest.raises(ConfigError, match="my_margin: must be at least 0, got -1|my_margin: .* at least 0, got -1"):
        parse_config({**RECIPE, "rl": "mine", "my_margin": -1})
    with pytest.raises(ConfigError, match="rl: unknown value 'min'; available: dpo, ipo, simpo, orpo, kto, grpo, mine"):
        parse_config({**RECIPE, "rl": "min"})


@pytest.mark.parametrize(
    ("name", "whose"), [("output_dir", "prefray"), ("val_set_size", "prefray"), ("my_margin", "strategy 'mine'")]
)
def test_a_key_that_there_is_already(name: str, whose: str) -> None:
    register_strategy(strategy(keys={"my_margin"}), keys=MarginKeys)
    again = type("Again", (Keys,), {"__annotations__": {name: "float"}, name: 0.0})
    register_strategy(strategy("again", keys={name}), keys=again)
    with pytest.raises(
        ConfigError, match=f"plugins: strategy 'again': its key '{name}' is a key of {whose} already; rename it"
    ):
        parse_config(RECIPE)


def test_callbacks() -> None:
    class Mine(TrainerCallback):
        pass

    def of_kto(cfg: Any) -> Mine | None:
        return Mine() if cfg.rl == "kto" else None

    for callback in (Mine, of_kto, of_kto):
        register_callback(callback)
    assert [len(registered_callbacks(SimpleNamespace(rl=rl))) for rl in ("kto", "dpo")] == [2, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda cfg: 3, "must be a TrainerCallback or None, got int"),
        (lambda cfg: cfg.nothing, r"raised AttributeError: .*test_registering.py:\d+\)"),
    ],
)
def test_a_callback_that_fails(make: Any, message: str) -> None:
    def mine(cfg: Any) -> Any:
        return make(cfg)

    register_callback(mine)
    with pytest.raises(OutsideError, match=rf"callback '.*test_registering.*mine'.* {message}"):
        registered_callbacks(SimpleNamespace())


def test_the_numbers_of_a_loss_and_its_strategy(example: None, tmp_path: Any) -> None:
    """With offset 0 the loss is the built-in one; at the first step, where policy and reference agree, softplus(offset)."""
    plain, offset = LossOptions(beta=0.3), LossOptions(beta=0.3, own={"offset": 0.7})
    reference = PairLogps(logps().chosen - 1, logps().rejected + 2, logps().chosen_lengths, logps().rejected_lengths)
    found = PAIR_LOSSES["offset"](logps(), reference, plain)
    torch.testing.assert_close(found, PAIR_LOSSES["sigmoid"](logps(), reference, plain))
    # log-ratios 1 and -2: 0.3 * 3 - 0.7 = 0.2
    torch.testing.assert_close(PAIR_LOSSES["offset"](logps(), reference, offset), torch.full((2,), math.log1p(math.exp(-0.2))))
    tokenizer = tiny_tokenizer()
    cfg = {"base_model": "given", "rl": "offset_dpo", "dpo_offset": 0.7, "bf16": False, "output_dir": str(tmp_path)}
    builder = HFRLTrainerBuilder({**cfg, "max_steps": 1, "save_strategy": "no"}, tiny_model(tokenizer), tokenizer)
    builder.train_dataset = pairs(4)
    trainer = builder.build()
    assert trainer.train().training_loss == pytest.approx(math.log1p(math.exp(0.7)), abs=1e-6)


def test_a_key_sets_an_option_of_a_loss(tmp_path: Path) -> None:
    found = {}

    @register_loss("shifted")
    def shifted(policy: PairLogps, reference: PairLogps, options: LossOptions) -> torch.Tensor:
        found.update(options.own)
        return (policy.chosen - reference.chosen) + options.own["shift"]

    losses = {"losses": classmethod(lambda cls, cfg: ["shifted"])}
    register_strategy(strategy(keys=DPOStrategy.keys | set(ShiftKeys.model_fields), **losses), keys=ShiftKeys)
    given = {"base_model": "given", "dpo_loss_type": "shifted", "bf16": False, "output_dir": str(tmp_path), "max_steps": 1}
    for keys, own in (({"my_shift": 0.0}, {"shift": 0.0}), ({"my_scale": 2.0}, {"shift": 0.5, "scale": 2.0})):
        tokenizer = tiny_tokenizer()
        builder = HFRLTrainerBuilder({**given, "rl": "mine", "save_strategy": "no", **keys}, tiny_model(tokenizer), tokenizer)
        builder.train_dataset = pairs(4)
        assert builder.build().train().training_loss == pytest.approx(own["shift"], abs=1e-6)
        assert found == own
    assert "option" not in str(config_class().model_json_schema()["properties"]["my_shift"])
    assert DPOStrategy.set_training_args_kwargs(as_config({"base_model": "given"})).keys().isdisjoint({"loss_options"})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda policy: 1 / 0, r"loss 'bad' raised ZeroDivisionError: division by zero \(.*test_registering.py:\d+\)"),
        (
            lambda policy: policy.chosen.mean(),
            r"loss 'bad' \(.*:\d+\) must return the loss of each pair, shape \(4,\), got shape \(\)",
        ),
        (lambda policy: 1.0, "must return the loss of each pair, .*, got float"),
    ],
)
def test_a_loss_that_fails_is_named_with_its_rows(returned: Any, message: str, tmp_path: Any) -> None:
    register_loss("bad", lambda policy, reference, options: returned(policy))
    tokenizer = tiny_tokenizer()
    cfg = {"base_model": "given", "dpo_loss_type": "bad", "bf16": False, "micro_batch_size": 4, "output_dir": str(tmp_path)}
    builder = HFRLTrainerBuilder({**cfg, "max_steps": 1, "save_strategy": "no"}, tiny_model(tokenizer), tokenizer)
    builder.train_dataset = pairs(4)
    with pytest.raises(OutsideError, match=f"{message}.*; in a batch of the rows "):
        builder.build().train()


def test_a_dataset_type(example: None) -> None:
    row = {"question": "Q", "answers": [{"text": "so", "score": 1}, {"text": "yes", "score": 3}, {"text": "no", "score": 0}]}
    assert load_transform("ranked")(row) == {"prompt": "Q\n", "chosen": "yes", "rejected": "no"}
    other = {**row, "ask": "A"}
    assert load_transform("ranked", field_prompt="ask")(other)["prompt"] == "A\n"
    datasets = [{"path": "ranked.jsonl", "type": "ranked", "field_prompt": "ask"}]
    assert parse_config({**RECIPE, "datasets": datasets}).datasets[0].type == "ranked"
    with pytest.raises(ConfigError, match="datasets.0.field_chosen: has no effect with type: ranked"):
        parse_config({**RECIPE, "datasets": [{**datasets[0], "field_chosen": "best"}]})
    with pytest.raises(ConfigError, match="datasets.0.type: no dataset type 'rankd' for rl: dpo; did you mean ranked"):
        parse_config({**RECIPE, "datasets": [{"path": "ranked.jsonl", "type": "rankd"}]})
    with pytest.raises(ConfigError, match="datasets.0.type: no dataset type 'ranked' for rl: kto"):
        parse_config({**RECIPE, "rl": "kto", "datasets": datasets})
