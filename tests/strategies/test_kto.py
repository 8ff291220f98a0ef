"""KTO's rows and its KL term."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset

from strategies.batch.kto_sampler import MismatchedRows, MismatchedSampler, number_prompts
from strategies.config import as_config
from strategies.methods.kto import KTOStrategy
from tests.tiny import prepared_labelled, tiny_model, tiny_tokenizer

Build = Callable[..., Any]


def history(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(("rows", "block"), [(12, 4), (13, 4), (3, 8), (14, 4)])
def test_every_row_meets_a_completion_of_its_own_global_batch(rows: int, block: int) -> None:
    indices = list(MismatchedSampler(rows, block, seed=7))
    order = [row for row, _ in indices]
    assert sorted(order) == list(range(rows))
    assert all(row != other for row, other in indices)
    for start in range(0, rows, block):
        members, others = zip(*indices[start : start + block], strict=True)
        if len(members) > 1:
            assert set(others) == set(members)


def test_the_order_changes_with_seed_and_epoch_and_nothing_else() -> None:
    sampler = MismatchedSampler(20, 4, seed=1)
    first = list(sampler)
    assert first == list(MismatchedSampler(20, 4, seed=1)) == list(sampler)
    assert first != list(MismatchedSampler(20, 4, seed=2))
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert [row for row, _ in MismatchedSampler(5, 2, seed=None)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seed", [7, None], ids=["training", "evaluation"])
@pytest.mark.parametrize(("rows", "block"), [(40, 4), (41, 4), (10, 2), (12, 64)])
def test_no_completion_is_of_the_same_prompt(rows: int, block: int, seed: int | None) -> None:
    """Halves of pairs stand beside each other, and a global batch may hold nothing but the two."""
    prompts = [row // 2 for row in range(rows)]
    for epoch in range(5):
        sampler = MismatchedSampler(rows, block, seed, prompts)
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert sorted(row for row, _ in indices) == list(range(rows))
        assert all(prompts[row] != prompts[other] for row, other in indices)
    if seed is None:  # each completion once, good and bad ones alike
        assert sorted(other for _, other in indices) == list(range(rows))
        assert [row for row, _ in indices] == list(range(rows))


def test_partners_have_other_prompts_whatever_their_order() -> None:
    """A permutation, as long as no prompt has more than half of the rows; and in no more time than there are rows."""
    prompts = [row // 3 for row in range(3000)]
    pairs = list(MismatchedSampler(3000, 3000, None, prompts))
    assert all(prompts[row] != prompts[other] for row, other in pairs)
    assert sorted(other for _, other in pairs) == list(range(3000))
    most = [0] * 27_000 + list(range(1, 3001))
    begun = time.process_time()
    assert all(most[row] != most[other] for row, other in MismatchedSampler(30_000, 30_000, None, most))
    assert time.process_time() - begun < 2


def test_rows_of_one_prompt_meet_each_other() -> None:
    assert all(row != other for row, other in MismatchedSampler(6, 4, 7, [0] * 6))
    assert number_prompts([[1, 2], [3], [1, 2], []]).tolist() == [0, 1, 0, 2]


def test_a_row_brings_the_other_rows_completion() -> None:
    rows = Dataset.from_list(prepared_labelled(4))
    found = MismatchedRows(rows)[(2, 1)]
    assert found["completion_ids"] == rows[2]["completion_ids"]
    assert found["KL_completion_ids"] == rows[1]["completion_ids"]


def test_each_epoch_has_its_own_order(build: Build) -> None:
    """The loss of a step is that of its rows: with a learning rate of next to nothing, equal rows have equal losses."""
    trainer = build(8, rl="kto", train=prepared_labelled(8), micro_batch_size=2, num_epochs=2, learning_rate=1e-12)
    trainer.train()
    chosen = history(trainer, "entropy")
    assert chosen[:4] != chosen[4:]
    assert sum(chosen[:4]) == pytest.approx(sum(chosen[4:]), rel=1e-2)


def test_the_kl_term_is_that_of_the_global_batch(build: Build) -> None:
    """Computed apart, on single sequences, from the weights before the step."""
    rows = prepared_labelled(6)
    trainer = build(2, rl="kto", train=rows, micro_batch_size=2, gradient_accumulation_steps=3, lr_scheduler="constant")
    trainer.train()
    twin = build(1, rl="kto", train=rows, micro_batch_size=2, gradient_accumulation_steps=3, lr_scheduler="constant")
    twin.train()
    sampler = MismatchedSampler(6, 6, seed=42)
    sampler.set_epoch(1)
    policy, reference = twin.model, tiny_model(tiny_tokenizer())
    ratios = [
        logps(policy, rows[row]["prompt_ids"], rows[other]["completion_ids"])
        - logps(reference, rows[row]["prompt_ids"], rows[other]["completion_ids"])
        for row, other in sampler
    ]
    assert history(trainer, "kl")[0] == 0.0
    assert history(trainer, "kl")[1] == pytest.approx(max(0.0, sum(ratios) / 6), rel=1e-3)
    assert history(trainer, "kl")[1] > 0.01


def logps(model: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        found = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
    return sum(found[len(prompt) - 1 + place, token].item() for place, token in enumerate(completion))


def test_weights_of_zero_switch_a_side_off(build: Build) -> None:
    trainer = build(1, rl="kto", train=prepared_labelled(5), micro_batch_size=5, kto_undesirable_weight=0.0)
    trainer.train()
    # Three good rows of five at 0.5 each, two bad ones at 0.
    assert history(trainer)[0] == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("good", "bad", "keys", "advice"),
    [
        (3, 3, {}, None),
        (4, 3, {}, None),
        (
            8,
            2,
            {},
            "kto: 8 good and 2 bad rows, weight x number 4.00 to 1; the paper advises 1 to 1.33, here kto_desirable",
        ),
        (8, 2, {"kto_desirable_weight": 0.25}, None),
        (2, 8, {}, "weight x number 0.25 to 1; .* kto_desirable_weight 4.00 to 5.33"),
        (2, 8, {"kto_undesirable_weight": 0.25}, None),
        (8, 0, {}, None),
    ],
)
def test_unbalanced_labels_are_noted(good: int, bad: int, keys: dict[str, Any], advice: str | None) -> None:
    cfg = as_config({"base_model": "tiny", "rl": "kto", **keys})
    found = list(KTOStrategy.notes(cfg, {"label": [True] * good + [False] * bad}.__getitem__))
    assert len(found) == (advice is not None)
    assert advice is None or re.search(advice, found[0])


def test_a_global_batch_of_one_row_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="micro_batch_size: kto estimates the KL term .* the global batch, which has one row"):
        build(1, rl="kto", train=prepared_labelled(4), micro_batch_size=1)
    build(1, rl="kto", train=prepared_labelled(4), micro_batch_size=1, gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("form", [int, float])
def test_labels_may_be_numbers(build: Build, form: type) -> None:
    plain = prepared_labelled(8)
    numbered = [{**row, "label": form(row["label"])} for row in plain]
    first, second = (build(2, rl="kto", train=rows, evaluate=rows) for rows in (plain, numbered))
    first.train()
    second.train()
    for name in ("loss", "rewards/chosen", "rewards/rejected", "logps/rejected", "eval_rewards/margins"):
        assert history(first, name) == history(second, name)


@pytest.mark.parametrize("label", [2, -1, "good", None])
def test_other_labels_are_refused(build: Build, label: Any) -> None:
    kind = float if isinstance(label, int) else type(label)
    rows = [{**row, "label": row["label"] if label is None else kind(row["label"])} for row in prepared_labelled(4)]
    rows[2]["label"] = label
    with pytest.raises(ValueError, match=r"train_dataset: label must be true or false \(or 1 or 0\) in every row, got "):
        build(1, rl="kto", train=rows)


def test_the_best_checkpoint_by_margin_needs_both_kinds(build: Build) -> None:
    good = [row for row in prepared_labelled(12) if row["label"]]
    keys = {"early_stopping_patience": 2, "eval_steps": 1}
    trainer = build(2, rl="kto", train=prepared_labelled(8), evaluate=good, **keys)
    with pytest.raises(ValueError, match="metric_for_best_model: eval_rewards/margins needs rows with a true and rows with a"):
        trainer.train()
    build(2, rl="kto", train=prepared_labelled(8), evaluate=good, metric_for_best_model="eval_loss", **keys).train()


def test_one_row_has_nobody_to_be_compared_with(build: Build) -> None:
    trainer = build(1, rl="kto", train=prepared_labelled(4))
    with pytest.raises(ValueError, match="there is one row; give more rows"):
        trainer.evaluate(prepared_labelled(1))


def test_the_kl_term_doesnt_depend_on_evaluations(build: Build) -> None:
    """Dropout acts in it as in the step, also right after an evaluation."""
    keys = {"rl": "kto", "train": prepared_labelled(8), "adapter": "lora", "lora_dropout": 0.5, "learning_rate": 5e-2}
    seen: list[bool] = []
    trainer = build(3, evaluate=prepared_labelled(4), eval_steps=1, **keys)
    estimate = trainer._estimate_kl
    trainer._estimate_kl = lambda model, batches: seen.append(model.training) or estimate(model, batches)
    trainer.train()
    # A training step, then an evaluation of two forwards.
    assert seen == [True, False, False] * 3


def test_rows_that_cant_be_counted_are_refused(build: Build) -> None:
    stream = Dataset.from_list(prepared_labelled(4)).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset: kto shuffles whole data sets; give a datasets.Dataset or a list"):
        build(1, rl="kto", train=stream).train()


def test_log_windows_without_one_kind_have_no_metric_of_it(build: Build) -> None:
    rows = [row for row in prepared_labelled(8) if row["label"]]
    trainer = build(2, rl="kto", train=rows)
    trainer.train()
    assert len(history(trainer, "rewards/chosen")) == 2
    assert not history(trainer, "rewards/rejected")
    assert not history(trainer, "rewards/margins")
