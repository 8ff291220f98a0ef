"""The trainer: its rows, its loss, its logs, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from strategies import HFRLTrainerBuilder
from strategies.inference.scoring import PairScorer
from tests.tiny import pairs, prepared_pairs, tiny_model, tiny_tokenizer


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_rows_may_come_after_build(config: dict[str, Any]) -> None:
    """The usage example of architecture.md."""
    tokenizer = tiny_tokenizer()
    builder = HFRLTrainerBuilder(config, tiny_model(tokenizer), tokenizer)
    trainer = builder.build(total_num_steps=4)
    assert trainer.train_dataset is None
    assert trainer.eval_dataset is None
    trainer.train_dataset, trainer.eval_dataset = Dataset.from_list(pairs(8)), prepared_pairs(4)
    output = trainer.train()
    assert output.global_step == 4
    assert history(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert history(trainer)[-1] < 0.6
    assert len(history(trainer, "eval_loss")) == 1


def test_raw_and_prepared_rows_train_the_same(build: Callable[..., Any]) -> None:
    raw, prepared = build(4, train=pairs(8)), build(4, train=prepared_pairs(8))
    raw.train()
    prepared.train()
    assert history(raw) == history(prepared)


def test_prepared_rows_are_not_tokenised_and_lose_their_text(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.trainer.dpo_trainer._tokenize", lambda *_, **__: pytest.fail("tokenised again"))
    trainer = build(1, train=prepared_pairs(4), evaluate={"a": prepared_pairs(2), "b": prepared_pairs(3)})
    assert trainer.train_dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row_id"]
    assert trainer.train_dataset[3]["chosen_ids"] == prepared_pairs(4)[3]["chosen_ids"]
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"a": 2, "b": 3}


def test_tensor_formatted_rows_are_joined_not_added(build: Callable[..., Any]) -> None:
    plain = build(2, train=prepared_pairs(4))
    formatted = build(2, train=Dataset.from_list(prepared_pairs(4)).with_format("torch"))
    plain.train()
    formatted.train()
    assert history(plain) == history(formatted)


def test_conversations_are_tokenised_with_the_chat_template(build: Callable[..., Any]) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello"}],
        "rejected": [{"role": "assistant", "content": "Go"}],
    }
    trainer = build(1, train=[row])
    decode = tiny_tokenizer().decode
    ids = trainer.train_dataset[0]
    assert decode(ids["prompt_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decode(ids["chosen_ids"]) == "Hello<|im_end|>\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset: got no rows"),
        (["text"], "train_dataset: expected rows that are mappings, got str"),
        (7, r"train_dataset: expected a datasets.Dataset or a list of dicts, got int"),
    ],
)
def test_what_is_not_rows_is_an_error(build: Callable[..., Any], rows: Any, message: str) -> None:
    trainer = build(1)
    with pytest.raises(ValueError, match=message):
        trainer.train_dataset = rows


def test_training_without_rows_is_an_error(config: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    trainer = HFRLTrainerBuilder(config, tiny_model(tokenizer), tokenizer).build(1)
    with pytest.raises(ValueError, match="train_dataset: nothing to train on; set trainer.train_dataset"):
        trainer.train()


def test_selection_without_evaluation_rows_is_an_error(build: Callable[..., Any]) -> None:
    trainer = build(1, early_stopping_patience=1)
    with pytest.raises(ValueError, match="eval_dataset: choosing the best checkpoint"):
        trainer.train()


def test_label_smoothing_changes_the_sigmoid_loss_as_it_should(build: Callable[..., Any]) -> None:
    """At a step with margins x the smoothed loss is loss + eps * mean(x)."""
    trainer, eps = build(4, num_epochs=4, dpo_label_smoothing=0.1), 0.1
    trainer.train()
    smoothed = trainer.evaluate(prepared_pairs(8))
    trainer.label_smoothing = 0.0
    plain = trainer.evaluate(prepared_pairs(8))
    assert smoothed["eval_rewards/margins"] > 0.1
    assert smoothed["eval_loss"] == pytest.approx(plain["eval_loss"] + eps * smoothed["eval_rewards/margins"], rel=1e-5)


def scored_pairs(number: int) -> list[dict[str, Any]]:
    """Prepared pairs with the tiny model's own log-probabilities as the reference's, the rejected ones 10 lower in all."""
    scorer = PairScorer(tiny_model(tiny_tokenizer()).eval(), tokens_per_forward=256)
    rows = prepared_pairs(number)
    scores = scorer.score(rows)
    return [
        {**row, "ref_chosen_logps": chosen.tolist(), "ref_rejected_logps": (rejected - 10.0 / len(rejected)).tolist()}
        for row, (chosen, rejected) in zip(rows, scores, strict=True)
    ]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_cached_scores_replace_the_reference(build: Callable[..., Any], packing: bool, adapter: dict[str, Any]) -> None:
    rows = scored_pairs(4)
    trainer = build(1, train=rows, evaluate=rows, reference="cached", sample_packing=packing, **adapter)
    assert trainer.ref_model is None
    found = trainer.evaluate()
    # Before the first step the policy is the reference, up to the 10 that were taken away.
    assert found["eval_rewards/rejected"] == pytest.approx(1.0, rel=1e-4)
    assert found["eval_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


def test_rows_without_scores_are_refused_where_scores_are_asked_for(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="reference: cached, but the rows of train_dataset have no ref_chosen_logps"):
        build(1, reference="cached")


def test_sums_are_no_scores(build: Callable[..., Any]) -> None:
    rows = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in prepared_pairs(2)]
    with pytest.raises(ValueError, match="must hold a list each, one log-probability per completion token, got float"):
        build(1, train=rows, reference="live")


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda scores: scores[1:], "row 2 has 9 values in ref_chosen_logps, and 10 completion tokens; score it again"),
        (lambda scores: [*scores[1:], float("nan")], "row 2 has a value in ref_chosen_logps that isn't finite"),
    ],
    ids=["short", "nan"],
)
def test_scores_that_do_not_fit_their_row_are_refused(
    build: Callable[..., Any], packing: bool, values: Callable[[list[float]], list[float]], message: str
) -> None:
    rows = scored_pairs(4)
    rows[2]["ref_chosen_logps"] = values(rows[2]["ref_chosen_logps"])
    with pytest.raises(ValueError, match=f"train_dataset: {message}"):
        build(1, train=rows, reference="cached", sample_packing=packing).train()


@pytest.mark.parametrize("loss", ["aot_unpaired", "sft"])
def test_losses_of_batches_are_evaluated_over_global_batches(build: Callable[..., Any], loss: str) -> None:
    rows = prepared_pairs(12)
    found = []
    for micro, accumulation, packing in ((8, 1, True), (2, 4, True), (4, 2, False)):
        keys = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "sample_packing": packing}
        found.append(build(1, train=rows, dpo_loss_type=[loss], num_epochs=1, **keys).evaluate(rows)["eval_loss"])
    assert found == pytest.approx(3 * found[:1], rel=1e-5)


def test_padding_keeps_to_the_tokens_of_a_forward(build: Callable[..., Any]) -> None:
    trainer = build(2, micro_batch_size=8, tokens_per_forward=150, pad_to_multiple_of=64)
    fed = [batch.fed_tokens for share in trainer.get_train_dataloader() for batch in share.batches]
    assert set(fed) <= {64, 128}
    with pytest.raises(ValueError, match="takes 60, in multiples of 64 .pad_to_multiple_of.; set it to 64 or more"):
        build(2, tokens_per_forward=60, pad_to_multiple_of=64).get_train_dataloader()


def test_a_model_without_finite_numbers_is_not_taken_for_one_that_cannot_pack(build: Callable[..., Any]) -> None:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="gives log-probabilities that aren't finite; its weights are damaged"):
        build(1, model=model, rl="simpo")


def test_tokens_are_counted(build: Callable[..., Any]) -> None:
    rows = prepared_pairs(4)
    trainer = build(2, train=rows)
    trainer.train()
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert history(trainer, "num_tokens")[-1] == tokens
    assert all(rate > 0 for rate in history(trainer, "tokens_per_second"))
    assert len(history(trainer, "tokens_per_second")) == 2


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "lora_dropout": 0.1}], ids=["full", "lora_dropout"])
def test_resumed_equals_never_stopped(build: Callable[..., Any], adapter: dict[str, Any]) -> None:
    keys = {"save_strategy": None, "save_steps": 2, **adapter}
    whole = build(4, **keys)
    whole.train()
    resumed = build(4, **keys)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert history(resumed) == history(whole)
    assert history(resumed, "num_tokens") == history(whole, "num_tokens")
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_nothing_is_sent_home(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: pytest.fail("telemetry"))
    build(1)
