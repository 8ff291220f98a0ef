"""The trainer of grpo, on raw and prepared prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.trainer import grpo_trainer

from strategies.config import as_config
from strategies.config.schedule import steps_per_epoch, total_steps
from strategies.methods.grpo import GRPOStrategy
from strategies.models.saving import write_model_card
from tests import reward_functions
from tests.laws.runs import LORA, losses
from tests.tiny import adapter_folder, save_tiny, tiny_model, tiny_tokenizer

REWARDS = ["tests.reward_functions.low_tokens"]
TRL: dict[str, Any] = {"reward_funcs": REWARDS, "num_generations": 2, "max_completion_length": 6}


def prompts(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {row} plus {row % 5}? ", "answer": row + row % 5} for row in range(number)]


def prepared(rows: list[dict[str, Any]]) -> Dataset:
    """The rows as a prepared store holds them."""
    tokenizer = tiny_tokenizer()
    return Dataset.from_list(
        [
            {
                "row_id": index,
                "prompt_ids": tokenizer(str(row["prompt"]))["input_ids"],
                "prompt": "text",
                "row": json.dumps(row),
            }
            for index, row in enumerate(rows)
        ]
    )


@pytest.fixture
def grpo(build: Callable[..., Any]) -> Callable[..., Any]:
    """`grpo(steps, trl={...}, **keys)` -> a trainer of the tiny model on prompts."""

    def make(steps: int | None = 3, train: Any = None, trl: dict[str, Any] | None = None, **keys: Any) -> Any:
        rows = prompts(8) if train is None else train
        return build(steps, train=rows, rl="grpo", trl={**TRL, **(trl or {})}, **keys)

    return make


def test_the_builder_refuses_the_batch(grpo: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="trl.num_generations: 4 must divide .* set gradient_accumulation_steps: 2$"):
        grpo(trl={"num_generations": 4})


@pytest.mark.parametrize(
    ("rows", "keys"),
    [
        (5, {}),
        (5, {"gradient_accumulation_steps": 2, "num_epochs": 1.5}),
        (5, {"gradient_accumulation_steps": 3, "trl": {"steps_per_generation": 2}}),
        (7, {"trl": {"num_iterations": 2, "generation_batch_size": 6}, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_trainer_runs_the_steps_that_were_told(grpo: Callable[..., Any], rows: int, keys: dict[str, Any]) -> None:
    trl = {**TRL, "max_completion_length": 1, **keys.pop("trl", {})}
    trainer = grpo(None, train=prompts(rows), trl=trl, **keys)
    trainer.train()
    cfg = as_config({"base_model": "tiny", "rl": "grpo", "trl": trl, "micro_batch_size": 2, **keys})
    assert trainer.state.max_steps == trainer.state.global_step == total_steps(rows, cfg)
    assert steps_per_epoch(rows, cfg) > 1


# Training


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what copies or loads a model, call by call."""
    calls: list[str] = []
    copied, loaded = copy.deepcopy, grpo_trainer.create_model_from_path

    def deepcopy(thing: Any, *args: Any) -> Any:
        calls.extend(["copy"] if isinstance(thing, torch.nn.Module) and not args else [])
        return copied(thing, *args)

    monkeypatch.setattr(copy, "deepcopy", deepcopy)
    monkeypatch.setattr(
        grpo_trainer, "create_model_from_path", lambda *args, **kwargs: calls.append("load") or loaded(*args, **kwargs)
    )
    return calls


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_full_training_beside_a_frozen_copy(grpo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    trainer = grpo(trl={"beta": 0.04})
    before = weights(trainer.model)
    assert calls == ["copy"]
    assert (trainer.beta, trainer.args.beta) == (0.04, 0.04)
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert losses(trainer, "kl")[-1] > 1e-6
    expected = {"reward", "reward_std", "rewards/low_tokens/mean", "completions/mean_length", "entropy", "tokens_per_second"}
    assert expected <= set(trainer.state.log_history[0])
    assert trainer.state.log_history[-1]["train_loss"] is not None
    trainer.create_model_card()
    assert "grpo, loss dapo, beta 0.04" in (Path(trainer.args.output_dir) / "README.md").read_text()


def test_tokens_are_counted(grpo: Callable[..., Any]) -> None:
    trainer = grpo(1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["num_tokens"] == trainer._total_train_tokens > 20
    assert entry["tokens_per_second"] > 0


def test_beta_0_has_no_reference(grpo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    trainer = grpo()
    trainer.train()
    assert calls == []
    assert trainer.ref_model is None
    assert losses(trainer, "kl") == []


@pytest.mark.parametrize("continued", [False, True])
def test_an_adapter_is_its_own_reference(grpo: Callable[..., Any], tmp_path: Path, continued: bool) -> None:
    keys = {"adapter": "lora", "lora_model_dir": adapter_folder(tmp_path / "adapter")} if continued else LORA
    trainer = grpo(trl={"beta": 0.04, "num_generations": 4}, micro_batch_size=8, **keys)
    trainer.train()
    assert trainer.ref_model is None
    assert ("ref" in trainer.model.peft_config) == continued
    assert losses(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    assert losses(trainer, "kl")[-1] > 1e-9
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_a_reference_of_its_own(grpo: Callable[..., Any], tmp_path: Path) -> None:
    trainer = grpo(1, trl={"beta": 0.04}, reference_model=save_tiny(tmp_path / "other", seed=1))
    trainer.train()
    assert losses(trainer, "kl")[0] > 1e-4


def test_the_reference_follows_the_policy(grpo: Callable[..., Any]) -> None:
    trainer = grpo(2, trl={"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0})
    trainer.train()
    reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
    assert all(torch.allclose(value, reference[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("stop", "trl"),
    [(2, {}), (5, {}), (2, {"beta": 0.04, "num_iterations": 2}), (8, {"beta": 0.04, "num_iterations": 2})],
)
def test_a_resumed_run_is_the_run(grpo: Callable[..., Any], tmp_path: Path, stop: int, trl: dict[str, Any]) -> None:
    """In the first epoch (of 3 steps, or 6 with two iterations) and in the second."""
    keys = {
        "save_steps": stop,
        "save_strategy": "steps",
        "save_total_limit": 9,
        "gradient_accumulation_steps": 2,
        "trl": trl,
        "num_epochs": 3.0,
    }
    straight = grpo(9, output_dir=str(tmp_path / "straight"), train=prompts(6), **keys)
    straight.train()
    resumed = grpo(9, output_dir=str(tmp_path / "resumed"), train=prompts(6), **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert losses(resumed, "num_tokens") == losses(straight, "num_tokens")
    assert losses(resumed) == losses(straight)
    assert len(losses(straight)) == 9
    found = weights(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in straight.model.state_dict().items())


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_resumed_within_a_generation_is_the_run(grpo: Callable[..., Any], tmp_path: Path, stop: int) -> None:
    """What was generated is in the checkpoint, and isn't judged again."""
    trl = {"reward_funcs": ["tests.reward_functions.remember"], "steps_per_generation": 4, "beta": 0.04}
    keys = {"train": prompts(8), "trl": trl, "save_steps": stop, "save_strategy": "steps", "save_total_limit": 9}
    reward_functions.SEEN.clear()
    straight = grpo(8, output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    assert len(reward_functions.SEEN) == 2
    resumed = grpo(8, output_dir=str(tmp_path / "resumed"), **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{stop}"))
    assert len(reward_functions.SEEN) == 2 + (stop < 4)
    assert losses(resumed) == losses(straight) and losses(resumed, "reward") == losses(straight, "reward")
    found = weights(resumed.model)
    assert all(torch.equal(value, found[name]) for name, value in straight.model.state_dict().items())


def test_a_resumed_run_goes_on_with_its_coefficient_of_entropy(grpo: Callable[..., Any], tmp_path: Path) -> None:
    adaptive = {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.01}
    keys = {"train": prompts(8), "trl": adaptive, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 9}
    straight = grpo(4, output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    resumed = grpo(4, output_dir=str(tmp_path / "resumed"), **keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert resumed.entropy_coef == straight.entropy_coef != 0.01
    assert losses(resumed) == losses(straight)


def test_raw_and_prepared_rows_are_the_same(grpo: Callable[..., Any]) -> None:
    found = []
    for rows in (prompts(8), prepared(prompts(8))):
        trainer = grpo(train=rows, micro_batch_size=8)
        trainer.train()
        found.append({name: losses(trainer, name) for name in ("loss", "grad_norm", "reward", "num_tokens")})
    assert found[0] == found[1]


def test_columns_reach_the_reward_functions(grpo: Callable[..., Any]) -> None:
    """Also those that Arrow couldn't type: prepared rows are decoded when they are read."""
    rows = [{"prompt": "a", "answer": 1, "extra": {"b": [1, "c"]}}, {"prompt": "d", "answer": "e"}]
    reward_functions.SEEN.clear()
    trainer = grpo(
        1, train=prepared(rows), trl={"reward_funcs": ["tests.reward_functions.remember"]}, gradient_accumulation_steps=2
    )
    trainer.train()
    (seen,) = reward_functions.SEEN
    found = {
        (prompt, answer): extra for prompt, answer, extra in zip(seen["prompts"], seen["answer"], seen["extra"], strict=True)
    }
    assert found == {("a", 1): {"b": [1, "c"]}, ("d", "e"): None}
    assert {len(ids) <= 6 for ids in seen["completion_ids"]} == {True}


def streamed(rows: list[dict[str, Any]]) -> IterableDataset:
    return prepared(rows).to_iterable_dataset()


@pytest.mark.parametrize("make", [list, prepared, streamed])
def test_conversations_reach_them_as_messages(grpo: Callable[..., Any], make: Callable[..., Any]) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"What is {row}?"}]} for row in range(2)]
    reward_functions.SEEN.clear()
    grpo(1, train=make(rows), trl={"reward_funcs": ["tests.reward_functions.remember"]}).train()
    seen = reward_functions.SEEN[0]
    assert seen["prompts"][0] in [row["prompt"] for row in rows]
    assert {message["role"] for (message,) in seen["completions"]} == {"assistant"}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_rows_without_a_prompt(grpo: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match="_dataset: expected prompts, got rows of question, without 'prompt'"):
        grpo(**{name: [{"question": "a"}]})


def test_rows_may_come_late_and_must_fill_a_batch(grpo: Callable[..., Any]) -> None:
    trainer = grpo(1, gradient_accumulation_steps=4)
    trainer.train_dataset = prompts(3)
    assert trainer.train_dataset[0]["answer"] == 0
    with pytest.raises(
        ValueError, match="train_dataset: 3 prompts don't fill one generation batch, 8 completions of 4 prompts"
    ):
        trainer.train()
    trainer.train_dataset = prepared(prompts(4))
    trainer.train_dataset = trainer.train_dataset
    assert trainer.train_dataset[3] == prompts(4)[3]
    trainer.train()


def test_the_reward_rises(grpo: Callable[..., Any]) -> None:
    trl = {"num_generations": 8, "max_completion_length": 4, "temperature": 1.0}
    trainer = grpo(25, trl=trl, micro_batch_size=32, learning_rate=1e-2, num_epochs=30.0)
    trainer.train()
    rewards = losses(trainer, "reward")
    assert sum(rewards[:3]) / 3 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85


def test_several_weighted_rewards(grpo: Callable[..., Any]) -> None:
    functions = [*REWARDS, "tests.reward_functions.length"]
    trainer = grpo(1, trl={"reward_funcs": functions, "reward_weights": [1.0, 0.5], "log_completions": True})
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["reward"] == pytest.approx(entry["rewards/low_tokens/mean"] + 0.5 * entry["rewards/length/mean"])
    assert list((Path(trainer.args.output_dir) / "completions").glob("*.parquet"))


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model(grpo: Callable[..., Any], tmp_path: Path, conversational: bool) -> None:
    tokenizer = tiny_tokenizer()
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    judge = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **size))
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = [{"prompt": [{"role": "user", "content": "Hello"}]}] if conversational else prompts(4)
    trainer = grpo(1, train=rows, trl={"reward_funcs": [str(tmp_path / "judge")]})
    trainer.train()
    assert trainer.state.log_history[0]["rewards/judge/std"] > 0


def test_the_best_checkpoint_by_reward(grpo: Callable[..., Any]) -> None:
    keys = {
        "eval_steps": 1,
        "save_steps": 1,
        "save_strategy": None,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
    }
    trainer = grpo(4, evaluate=prepared(prompts(3)), **keys)
    trainer.train()
    rewards = losses(trainer, "eval_reward")
    assert trainer.args.metric_for_best_model == "eval_reward" and trainer.args.greater_is_better
    assert trainer.state.best_metric == max(rewards)
    assert len(rewards) >= 3
    named = GRPOStrategy.evaluation_metrics(as_config({"base_model": "m", "rl": "grpo", "trl": TRL}))
    assert set(named) <= {name for entry in trainer.state.log_history for name in entry}


def test_nothing_to_evaluate(grpo: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="eval_dataset: choosing the best checkpoint and stopping early need rows"):
        grpo(1, eval_steps=1, early_stopping_patience=1).train()


def test_dropout_is_off_in_policy_and_reference(grpo: Callable[..., Any]) -> None:
    model = tiny_model(tiny_tokenizer(), attention_dropout=0.3)
    model.dropout = torch.nn.Dropout(0.3)
    trainer = grpo(1, trl={"beta": 0.04}, model=model)
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert (trainer.model.dropout.p, reference.dropout.p) == (0, 0)


def test_rewards_that_nobody_gave_are_left_out(grpo: Callable[..., Any], tmp_path: Path) -> None:
    trainer = grpo(2, trl={"reward_funcs": ["tests.reward_functions.abstain"]})
    trainer.train()
    assert all(value is not None for entry in trainer.state.log_history for value in entry.values())
    assert not any("reward" in entry for entry in trainer.state.log_history)
    write_model_card(trainer, tmp_path)
    assert "| loss |" in (tmp_path / "README.md").read_text()


def test_throughput_counts_steps_that_reuse_completions(grpo: Callable[..., Any]) -> None:
    trainer = grpo(4, trl={"num_iterations": 2})
    trainer.train()
    rates = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foo": 1}, r"trl\.generation_kwargs\.foo: no argument of generation; "),
        ({"num_beam": 2}, "did you mean num_beams?"),
        ({"temperature": 2.0}, r"trl\.generation_kwargs\.temperature: has a key of its own.*write it as trl\.temperature"),
        ({"max_new_tokens": 2}, r"write it as trl\.max_completion_length"),
    ],
)
def test_generation_arguments_are_checked(grpo: Callable[..., Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(1, trl={"generation_kwargs": given})
