"""Joint forwards: each row has the values and gradients that its own model gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from strategies.packing.layout import PackedRow, join_rows, pack, pair_tokens
from strategies.packing.support import prepare_packing, score_row
from strategies.slots import SharedBase, SlotHost
from strategies.slots import joint_model as joint
from strategies.slots.joint_model import JointModel, LayersMissed, SlotRow, adapters_of, why_not_joint
from strategies.slots.joint_steps import JointSteps, SlotScorer
from strategies.slots.process_state import TorchRandom
from tests.laws.slots import attach, run_together, run_trial, shared_base, trainer_of
from tests.tiny import save_tiny, tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer

FAMILIES = {"llama": tiny_model, "tied": tiny_qwen, "gpt2": tiny_gpt2}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rslora": {"r": 8, "use_rslora": True, "lora_alpha": 3},
    "dropout": {"r": 4, "lora_dropout": 0.3},
    "dora": {"r": 2, "use_dora": True, "lora_dropout": 0.3},
    "bias": {"r": 4, "lora_bias": True},
    "few": {"r": 16, "target_modules": r".*\.0\..*(down_proj|c_proj)"},
}
WANTED = ("entropy", "mean_logits")


def row_of(length: int, seed: int) -> PackedRow:
    """A row of one pair."""
    ids = torch.randint(3, 200, (3, length), generator=torch.Generator().manual_seed(seed)).tolist()
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    return pack([pair_tokens(dict(zip(columns, (ids[0], ids[1], ids[2][: length // 2]), strict=True)))])


def policy_on(base: SharedBase, keys: dict[str, Any], seed: int = 0) -> Any:
    """A model on the base whose adapter has an effect."""
    torch.manual_seed(seed)
    model = get_peft_model(base.new_model(), LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, **keys}))
    for module in model.get_base_model().modules():
        if isinstance(module, torch.nn.Dropout) and "lora" not in type(module).__name__.lower():
            module.p = module.p if module in dropouts_of(model) else 0.0
    prepare_packing(model)
    return model.train()


def dropouts_of(model: Any) -> list[Any]:
    """The dropouts of the adapter."""
    return [module for name, module in model.named_modules() if ".lora_dropout." in name]


def as_row(policy: Any, row: PackedRow, seed: int) -> SlotRow:
    torch.manual_seed(seed)
    return SlotRow(adapters_of(policy), row, WANTED, TorchRandom())


def gradients(policy: Any) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad}
    policy.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_row_among_others_is_the_row_alone(family: str, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and the random numbers that were drawn."""
    monkeypatch.setitem(joint.BLOCK, "cpu", multiple)
    base = SharedBase(FAMILIES[family](tiny_tokenizer()))
    model = JointModel(base)
    policies = [policy_on(base, keys, seed) for seed, keys in enumerate(ADAPTERS.values())]
    rows = [as_row(policy, row_of(5 + 3 * number, number), number) for number, policy in enumerate(policies)]
    model.forward(rows)
    for row in rows:
        assert row.outputs is not None
        row.outputs.log_probs.square().sum().backward()
    model.backward(rows)
    for number, (name, policy, row) in enumerate(zip(ADAPTERS, policies, rows, strict=True)):
        assert row.outputs is not None
        found = gradients(policy)
        torch.manual_seed(number)
        alone = score_row(policy, row.row, WANTED)
        for values in ("log_probs", *WANTED):
            torch.testing.assert_close(getattr(row.outputs, values), getattr(alone, values), rtol=1e-4, atol=1e-5)
        alone.log_probs.square().sum().backward()
        for weight, expected in gradients(policy).items():
            # Against the largest: some are 0 but for rounding.
            torch.testing.assert_close(
                found[weight], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), msg=f"{name}: {weight}"
            )
        with row.random.used():
            drawn = torch.rand(3)
        assert torch.equal(drawn, torch.rand(3)), name


def test_only_rows_with_a_loss_have_gradients() -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()))
    policies = [policy_on(base, {"r": 4}, seed) for seed in range(2)]
    rows = [as_row(policy, row_of(6, 0), 0) for policy in policies]
    model = JointModel(base)
    model.forward(rows)
    assert rows[1].outputs is not None
    rows[1].outputs.log_probs.sum().backward()
    model.backward(rows)
    assert not any(gradient.any() for gradient in gradients(policies[0]).values())
    assert all(gradient.any() for gradient in gradients(policies[1]).values())


def test_nan_stays_in_its_row() -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()))
    policies = [policy_on(base, {"r": 4}, seed) for seed in range(3)]
    with torch.no_grad():
        next(weight for weight in policies[1].parameters() if weight.requires_grad).fill_(torch.nan)
    rows = [as_row(policy, row_of(6, seed), 0) for seed, policy in enumerate(policies)]
    model = JointModel(base)
    model.forward(rows)
    for row in rows:
        assert row.outputs is not None
        row.outputs.log_probs.sum().backward()
    model.backward(rows)
    for number, (policy, row) in enumerate(zip(policies, rows, strict=True)):
        assert row.outputs is not None
        is_finite = [bool(row.outputs.log_probs.isfinite().all())]
        is_finite += [bool(gradient.isfinite().all()) for gradient in gradients(policy).values()]
        assert all(is_finite) if number != 1 else not is_finite[0]


def test_a_layer_that_no_row_passes_is_noticed() -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()))
    row = as_row(policy_on(base, {"r": 4}), row_of(6, 0), 0)
    # As an expert, to which some tokens are sent.
    row.adapters["lm_head"] = next(iter(row.adapters.values()))
    with pytest.raises(LayersMissed, match="aren't given the tokens"):
        JointModel(base).forward([row])


def test_rows_are_joined_with_padding() -> None:
    rows = [row_of(length, length) for length in (3, 8)]
    joined, sizes = join_rows(rows, multiple=10)
    assert [row.input_ids.shape[1] for row in rows] == [6, 19] and sizes == [6, 4, 19, 1]
    assert joined.input_ids.shape == joined.position_ids.shape == (1, 30)
    assert sum(segment.tokens for segment in joined.segments) == 30
    places = [*rows[0].scored_positions.tolist(), *(rows[1].scored_positions + 10).tolist()]
    assert joined.scored_positions.tolist() == places
    assert joined.labels.tolist() == [*rows[0].labels.tolist(), *rows[1].labels.tolist()]


class OfLength(SlotScorer):
    """A scorer with a row of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.slot = type("S", (), {"trainer": type("T", (), {"args": type("A", (), {"device": torch.device("cpu")})})})

    @property
    def length(self) -> int:
        return self.tokens


@pytest.mark.parametrize(("limit", "groups"), [(10, [[4, 6], [9], [3]]), (3, [[4], [6], [9], [3]]), (None, [[4, 6, 9, 3]])])
def test_forwards_take_rows_up_to_a_limit(limit: int | None, groups: list[list[int]]) -> None:
    steps = JointSteps(SharedBase(tiny_model(tiny_tokenizer())), limit)
    found = steps.groups([OfLength(tokens) for tokens in (4, 6, 9, 3)])
    assert [[scorer.length for scorer in group] for group in found] == groups
    assert list(steps.groups([])) == []


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, None),
        ({"peft_use_dora": True}, None),
        ({"sample_packing": False}, "padded"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"full_determinism": True}, "full_determinism"),
        ({"rl": "kto", "micro_batch_size": 2}, "padded"),
    ],
)
def test_which_trainers_run_jointly(keys: dict[str, Any], why: str | None, model_folder: str, tmp_path: Path) -> None:
    base = shared_base(model_folder)
    trainer = trainer_of(tmp_path, {"base_model": model_folder, **keys}, lambda _: base.new_model())
    reason = why_not_joint(trainer)
    assert reason is None if why is None else reason is not None and why in reason


def test_rows_of_all_slots_stand_in_one_forward(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the forward fails, each row runs alone."""
    sizes: list[int] = []
    forward = JointModel.forward

    def counted(self: JointModel, rows: Any) -> None:
        sizes.append(len(rows))
        if sizes == [1, 1, 1, 3]:  # each has shown that it can, and then all had a step
            raise torch.OutOfMemoryError("planted")
        forward(self, rows)

    monkeypatch.setattr(JointModel, "forward", counted)
    trials = {name: {"base_model": model_folder, "seed": seed, "max_steps": 3} for seed, name in enumerate("abc")}
    ends = run_together(SlotHost(shared_base(model_folder), run_trial(tmp_path), 3), [attach(trials)])
    assert [ended.error for ended in ends.values()] == [None] * 3
    assert sizes == [1, 1, 1, 3, 1, 1, 1, 3, 3]


def test_an_error_in_a_forward_is_that_of_its_slot(model_folder: str, tmp_path: Path) -> None:
    run = run_trial(tmp_path)

    def poisoned(slot: Any) -> Any:
        if slot.name == "bad":
            join = slot.join

            def with_long_ids(trainer: Any) -> None:
                join(trainer)
                trainer.train_dataset = [{**row, "chosen_ids": [10**6]} for row in trainer.train_dataset]

            slot.join = with_long_ids
        return run(slot)

    trials = {name: {"base_model": model_folder, "max_steps": 2} for name in ("bad", "good")}
    ends = run_together(SlotHost(shared_base(model_folder), poisoned, 2), [attach(trials)])
    assert "out of bounds" in str(ends["bad"].error) and ends["good"].error is None
