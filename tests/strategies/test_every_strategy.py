"""What holds for every strategy that learns from data: mixins, selection, early stopping, saving, checkpoints, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from strategies.config import as_config
from strategies.methods.registry import STRATEGIES, get_strategy
from strategies.mixins import (
    DistributedParallelMixin,
    OptimizerInitMixin,
    OptimizerMixin,
    RngLoaderMixin,
    SchedulerMixin,
    SyncedReferenceMixin,
)
from strategies.models.saving import save_final
from tests.strategies.conftest import small_config, small_trainer
from tests.tiny import labelled, pairs, prepared_labelled, prepared_pairs, tiny_model, tiny_tokenizer

Build = Callable[..., Any]
LEARN_FROM_DATA = [rl for rl, strategy in STRATEGIES.items() if strategy.batch_kind != "prompt"]
FORMS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": "lora", "lora_r": 4}}
MIXINS = (
    RngLoaderMixin,
    SchedulerMixin,
    OptimizerMixin,
    OptimizerInitMixin,
    SyncedReferenceMixin,
    DistributedParallelMixin,
)

every_strategy = pytest.mark.parametrize("rl", LEARN_FROM_DATA)
every_form = pytest.mark.parametrize("form", list(FORMS))


def rows(rl: str, number: int = 8) -> list[dict[str, Any]]:
    return prepared_labelled(number) if rl == "kto" else prepared_pairs(number)


def raw(rl: str, number: int = 8) -> list[dict[str, Any]]:
    return labelled(number) if rl == "kto" else pairs(number)


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("rl", list(STRATEGIES))
def test_every_trainer_has_the_mixins(rl: str) -> None:
    assert all(issubclass(get_strategy(rl).get_trainer_class(), mixin) for mixin in MIXINS)


@dataclass
class Trained:
    """A trainer that has trained 8 steps, two epochs, with a checkpoint of step 5, and its evaluations."""

    trainer: Any
    before: dict[str, float]
    after: dict[str, float]


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Trained]:
    """`trained(rl, form)`: made when it is first asked for; tests don't train it further."""

    @cache
    def make(rl: str, form: str) -> Trained:
        trainer = small_trainer(small_config(base, tmp_path_factory.mktemp(rl)), 8, **long_keys(rl, form))
        before = trainer.evaluate()
        trainer.train()
        return Trained(trainer, before, trainer.evaluate())

    return make


def long_keys(rl: str, form: str) -> dict[str, Any]:
    keys = {"rl": rl, "train": rows(rl), "evaluate": rows(rl), "learning_rate": 5e-3, "num_epochs": 2}
    return {**keys, "save_strategy": None, "save_steps": 5, **FORMS[form]}


@every_form
@every_strategy
def test_the_loss_falls_and_the_margin_grows(trained: Callable[..., Trained], rl: str, form: str) -> None:
    found = trained(rl, form)
    assert found.after["eval_loss"] < found.before["eval_loss"]
    assert found.after["eval_rewards/margins"] > found.before["eval_rewards/margins"]
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logits/chosen", "entropy"} <= {
        name for entry in found.trainer.state.log_history for name in entry
    }


@every_strategy
def test_evaluations_report_what_the_strategy_says(trained: Callable[..., Trained], rl: str) -> None:
    named = get_strategy(rl).evaluation_metrics(as_config({"base_model": "m", "rl": rl}))
    assert set(named) <= trained(rl, "full").after.keys()
    assert get_strategy(rl).best_metric in named


def test_kl_is_the_mean_log_ratio_of_both_answers(trained: Callable[..., Trained]) -> None:
    found = trained("dpo", "full")
    assert found.before["eval_kl"] == pytest.approx(0, abs=1e-5)
    rewards = found.after["eval_rewards/chosen"] + found.after["eval_rewards/rejected"]
    assert found.after["eval_kl"] == pytest.approx(rewards / 2 / found.trainer.beta, rel=1e-4)
    assert abs(found.after["eval_kl"]) > 0.1


@every_strategy
def test_raw_and_prepared_rows_train_the_same(build: Build, rl: str) -> None:
    plain, prepared = build(3, rl=rl, train=raw(rl)), build(3, rl=rl, train=rows(rl))
    plain.train()
    prepared.train()
    assert history(plain) == history(prepared)


@every_form
@every_strategy
def test_resumed_equals_never_stopped(build: Build, trained: Callable[..., Trained], rl: str, form: str) -> None:
    """Also in the middle of the second epoch, which has another order than the first."""
    whole, resumed = trained(rl, form).trainer, build(8, **long_keys(rl, form))
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-5"))
    assert history(resumed) == history(whole)
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@every_strategy
def test_the_strategys_metric_stops_early(build: Build, rl: str) -> None:
    """With a learning rate of next to nothing no evaluation is better than the first."""
    keys = {"learning_rate": 1e-12, "early_stopping_patience": 2, "eval_steps": 1, "num_epochs": 9}
    trainer = build(20, rl=rl, train=rows(rl), evaluate=rows(rl, 4), **keys)
    assert trainer.args.metric_for_best_model == get_strategy(rl).best_metric
    trainer.train()
    values = history(trainer, trainer.args.metric_for_best_model)
    signed = [value if trainer.args.greater_is_better else -value for value in values]
    last_best = signed.index(max(signed)) + 1  # the first of equals
    assert trainer.state.global_step == len(values) == last_best + 2


@every_form
@every_strategy
def test_the_best_checkpoint_comes_back(build: Build, rl: str, form: str) -> None:
    """The margin as a thing to minimise is best at the first evaluation."""
    worst = {"metric_for_best_model": "eval_rewards/margins", "greater_is_better": False, "load_best_model_at_end": True}
    cadence = {"eval_steps": 1, "save_steps": 1, "save_strategy": None}
    trainer = build(4, rl=rl, train=rows(rl), evaluate=rows(rl, 4), **worst, **cadence, **FORMS[form])
    trainer.train()
    values = history(trainer, "eval_rewards/margins")
    assert values[0] < values[-1]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(values[0], rel=1e-4)


@every_form
@every_strategy
def test_the_saved_model_loads(trained: Callable[..., Trained], tmp_path: Path, base: str, rl: str, form: str) -> None:
    trainer = trained(rl, form).trainer
    folder = save_final(trainer, tiny_tokenizer(), tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(base if FORMS[form] else folder)
    loaded = PeftModel.from_pretrained(whole, str(folder)) if FORMS[form] else whole
    ids = torch.tensor([[1, 2, 3]])
    own = trainer.model.eval()
    assert torch.allclose(loaded.eval()(ids).logits, own(ids).logits, atol=1e-5)
    assert not torch.allclose(loaded(ids).logits, tiny_model(tiny_tokenizer())(ids).logits, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert f"- {rl}\n" in card
    assert f"after {rl.upper()}" in card


@every_strategy
def test_answers_at_each_evaluation(build: Build, rl: str) -> None:
    trainer = build(2, rl=rl, train=rows(rl), evaluate=rows(rl, 4), eval_steps=2, dpo_generate_during_eval=True)
    trainer.train()
    expected = {"prompt", "policy", "reference"} if get_strategy(rl).requires_reference else {"prompt", "policy"}
    assert [set(row) for row in trainer.generations] == [expected] * 4


@pytest.mark.parametrize(
    ("rl", "given", "message"),
    [
        (
            "dpo",
            labelled(2),
            r"train_dataset: expected pairs \(prompt, chosen, rejected\), got rows of prompt, completion, lab",
        ),
        ("simpo", labelled(2), "labelled completions are for rl: kto"),
        ("orpo", [{"prompt": "a"}], "got rows of prompt; prompts alone are for rl: grpo"),
        (
            "kto",
            pairs(2),
            r"train_dataset: expected labelled completions \(prompt, completion, label\), got pairs; split them with trl\.d",
        ),
        ("kto", prepared_pairs(2), r"got pairs; split them .*in a recipe: `split_pairs: true`"),
        ("kto", [{"prompt": "a", "completion": "b"}], "got rows of prompt, completion, without 'label'; label is true for a"),
    ],
)
def test_rows_of_another_kind_are_refused(build: Build, rl: str, given: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(1, rl=rl, train=given)


@every_strategy
def test_evaluation_rows_of_another_kind_are_refused(build: Build, rl: str) -> None:
    trainer = build(1, rl=rl, train=rows(rl))
    with pytest.raises(ValueError, match="eval_dataset: expected"):
        trainer.eval_dataset = pairs(2) if rl == "kto" else labelled(2)


@every_strategy
def test_several_evaluation_sets_have_metrics_of_their_own(build: Build, rl: str) -> None:
    sets = {"a": rows(rl, 4), "b": rows(rl, 8)[4:]}
    cadence = {"eval_steps": 1, "save_steps": 1, "save_strategy": None, "load_best_model_at_end": True}
    trainer = build(2, rl=rl, train=rows(rl), evaluate=sets, metric_for_best_model="eval_b_rewards/chosen", **cadence)
    trainer.train()
    assert len(history(trainer, "eval_a_rewards/chosen")) == len(history(trainer, "eval_b_rewards/chosen")) == 2
    assert not history(trainer, "eval_rewards/chosen")
    assert trainer.state.best_metric == max(history(trainer, "eval_b_rewards/chosen"))
    unnamed = build(2, rl=rl, train=rows(rl), evaluate=sets, **cadence)
    with pytest.raises(ValueError, match="metric_for_best_model: .* there are 2; name one of them, such as eval_a_rewards/"):
        unnamed.train()


@every_strategy
def test_a_step_whose_loss_isnt_finite_is_not_taken(build: Build, rl: str) -> None:
    trainer = build(1, rl=rl, train=rows(rl))
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.raises(ValueError, match="step 1: the loss is not finite.*; the step was not taken"):
        trainer.train()
    assert torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, before)
