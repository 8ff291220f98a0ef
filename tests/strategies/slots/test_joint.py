"""Joint forwards: each row has the values and gradients that its own model gives it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from strategies.packing.layout import PackedRow, join_rows, pack, pair_tokens
from strategies.packing.support import prepare_packing, score_row
from strategies.slots import CantShare, SharedBase, SlotHost, TakeTurns
from strategies.slots import joint_model as joint
from strategies.slots.joint_model import JointModel, LayersMissed, SlotRow, adapters_of, why_not_joint
from strategies.slots.joint_steps import JointSteps, SlotScorer
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
    return SlotRow(adapters_of(policy), row, [weight for weight in policy.parameters() if weight.requires_grad], WANTED)


def gradients(policy: Any) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in policy.named_parameters() if weight.requires_grad}
    policy.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_row_among_others_is_the_row_alone(family: str, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradients and the random numbers that were drawn."""
    monkeypatch.setitem(joint.BLOCK, "cpu", multiple)
    compare(FAMILIES[family], [(name, 5 + 3 * number) for number, name in enumerate(ADAPTERS)])


@pytest.mark.parametrize(
    ("multiple", "rows"),
    [
        (16, [("lora", 4), ("rslora", 10)]),  # 9 tokens and 7 of padding, 24 and 8: twice 24 in all
        (1, [("few", 3), ("few", 3), ("lora", 7), ("rslora", 2)]),  # 6, 6, 16, 4: twice 16; most layers have two adapters
        (1, [("lora", 8), ("rslora", 8)]),
        (16, [("lora", 4), ("lora", 4), ("dora", 4), ("dropout", 4)]),
    ],
)
def test_rows_whose_lengths_add_up_to_a_batch_of_others(
    multiple: int, rows: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(joint.BLOCK, "cpu", multiple)
    compare(tiny_model, rows)


def compare(make_model: Callable[[Any], Any], chosen: list[tuple[str, int]]) -> None:
    """Compare rows in a joint forward with the same ones alone.

    Args:
        chosen: name in `ADAPTERS` and length of each row.
    """
    base = SharedBase(make_model(tiny_tokenizer()))
    model = JointModel(base)
    policies = [policy_on(base, ADAPTERS[name], seed) for seed, (name, _) in enumerate(chosen)]
    pairs = zip(policies, chosen, strict=True)
    rows = [as_row(policy, row_of(length, number), number) for number, (policy, (_, length)) in enumerate(pairs)]
    model.forward(rows)
    for row in rows:
        assert row.outputs is not None
        row.outputs.log_probs.square().sum().backward()
    model.backward(rows)
    for number, ((name, _), policy, row) in enumerate(zip(chosen, policies, rows, strict=True)):
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
        ({"optimizer": "lomo"}, "steps in the backward"),
    ],
)
def test_which_trainers_run_jointly(keys: dict[str, Any], why: str | None, model_folder: str, tmp_path: Path) -> None:
    base = shared_base(model_folder)
    trainer = trainer_of(tmp_path, {"base_model": model_folder, **keys}, lambda _: base.new_model())
    reason = why_not_joint(trainer)
    assert reason is None if why is None else reason is not None and why in reason


class Failing:
    """A part of `JointModel`, which fails where several rows stand in it; `sizes` are those of all calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, fails: Callable[[list[int]], bool]) -> None:
        self.sizes: list[int] = []
        run = getattr(JointModel, part)

        def counted(model: JointModel, rows: Any) -> None:
            self.sizes.append(len(rows))
            run(model, rows)
            if fails(self.sizes):  # after its work: random numbers are drawn by then, gradients added
                raise torch.OutOfMemoryError("planted")

        monkeypatch.setattr(JointModel, part, counted)


def run_three(model_folder: str, folder: Path, joint_tokens: int | None = 1024, **keys: Any) -> dict[str, Any]:
    """Three trials in slots; how each has ended."""
    trials = {name: {"base_model": model_folder, "seed": seed, "max_steps": 3, **keys} for seed, name in enumerate("abc")}
    return run_together(SlotHost(shared_base(model_folder), run_trial(folder), 3, joint_tokens=joint_tokens), [attach(trials)])


def test_rows_of_all_slots_stand_in_one_forward(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Failing(monkeypatch, "forward", lambda sizes: False)
    assert all(ended.error is None for ended in run_three(model_folder, tmp_path).values())
    assert forward.sizes == [1, 1, 1, 3, 3, 3]  # each has shown that it can


@pytest.mark.parametrize("keys", [{}, {"bf16": True, "max_steps": 1}], ids=["fp32", "bf16"])
def test_a_row_that_shares_no_forward_is_what_it_is_in_a_turn(
    keys: dict[str, Any], model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: its slot's own model runs it."""
    forward = Failing(monkeypatch, "forward", lambda sizes: False)
    keys = {"lora_dropout": 0.1, **keys}
    ways = {tokens: run_three(model_folder, tmp_path / str(tokens), tokens, **keys) for tokens in (0, 1)}
    assert forward.sizes == [1, 1, 1]
    for name, ended in ways[0].items():
        assert ended.error is None
        for weight, value in ways[1][name].result["weights"].items():
            assert torch.equal(value, ended.result["weights"][weight]), weight


IN_PARTS = {"gradient_accumulation_steps": 2, "tokens_per_forward": 50, "max_steps": 2}


@pytest.fixture(scope="module")
def in_parts(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three trials in slots, with several forwards in a step."""
    return run_three(model_folder, tmp_path_factory.mktemp("parts"), **IN_PARTS)


@pytest.mark.parametrize(("part", "sizes"), [("forward", [1, 1, 1, 3]), ("backward", [3, 1, 1, 1])])
def test_rows_run_alone_where_a_forward_has_no_room(
    part: str,
    sizes: list[int],
    in_parts: dict[str, Any],
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And from then on fewer share one; two of these three rows do."""
    failing = Failing(monkeypatch, part, lambda found: found == sizes[: sizes.index(3) + 1])
    found = run_three(model_folder, tmp_path, **IN_PARTS)
    assert failing.sizes[: len(sizes)] == sizes and 3 not in failing.sizes[len(sizes) :]
    assert "can't run in one forward (OutOfMemoryError: planted); from now on there are at most" in caplog.text
    for name, ended in found.items():
        assert ended.error is None
        for weight, value in in_parts[name].result["weights"].items():
            torch.testing.assert_close(ended.result["weights"][weight], value, rtol=1e-4, atol=1e-6)


def test_rows_run_alone_once_turns_are_asked_for(model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Failing(monkeypatch, "forward", lambda sizes: False)
    trials = {name: {"base_model": model_folder, "max_steps": 3} for name in "ab"}
    host = SlotHost(shared_base(model_folder), run_trial(tmp_path), 3)
    ends = run_together(host, [attach(trials), [], [TakeTurns()]])
    assert all(ended.error is None for ended in ends.values())
    assert forward.sizes == [1, 1, 2, 2]


@pytest.mark.parametrize("joint_tokens", [1, 1024], ids=["one", "several"])
def test_a_device_that_fails_ends_the_host(
    joint_tokens: int, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, in the forward of one row as in that of several: nobody knows whose row of several it was."""
    forward = JointModel.forward

    def broken(*_: Any) -> None:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(JointModel, "forward", lambda model, rows: broken() if len(rows) > 1 else forward(model, rows))
    monkeypatch.setattr(SlotScorer, "run_alone", broken)
    with pytest.raises(torch.AcceleratorError):
        run_three(model_folder, tmp_path, joint_tokens)


def test_a_base_that_drops_values_out_by_a_rate_of_its_own(model_folder: str, tmp_path: Path) -> None:
    """As OPT's layers do, without a module."""
    base = shared_base(model_folder)
    trainer = trainer_of(tmp_path, {"base_model": model_folder}, lambda _: base.new_model())
    trainer.model.get_base_model().model.layers[0].dropout = 0.1
    assert "drop values out" in str(why_not_joint(trainer))


class Watch(TrainerCallback):
    """Looks at a model's forwards."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.register_forward_hook(lambda *_: None)


def run_with_bad(folder: Path, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As `run_trial`; the trainer of the slot `bad` is changed before it joins."""
    run = run_trial(folder)

    def run_slot(slot: Any) -> Any:
        join = slot.join

        def change_and_join(trainer: Any) -> None:
            if slot.name == "bad":
                change(trainer)
            join(trainer)

        slot.join = change_and_join
        return run(slot)

    return run_slot


@pytest.mark.parametrize(
    "change",
    [
        lambda trainer: trainer.add_callback(Watch()),
        lambda trainer: trainer.model.register_forward_hook(lambda *_: None),  # as by `on_init_end`
    ],
)
def test_a_callback_that_looks_at_forwards_would_miss_them(
    change: Callable[[Any], Any], model_folder: str, tmp_path: Path
) -> None:
    trials = {name: {"base_model": model_folder, "max_steps": 2} for name in ("bad", "good")}
    ends = run_together(SlotHost(shared_base(model_folder), run_with_bad(tmp_path, change), 2), [attach(trials)])
    assert isinstance(ends["bad"].error, CantShare) and "hooks" in str(ends["bad"].error) and ends["good"].error is None


def test_a_trainer_of_others_takes_turns(model_folder: str, tmp_path: Path) -> None:
    base = shared_base(model_folder)
    trainer = trainer_of(tmp_path, {"base_model": model_folder}, lambda _: base.new_model())
    trainer.__class__ = type("Own", (type(trainer),), {"__module__": "somebodys.module"})
    assert "somebodys" in str(why_not_joint(trainer))


def test_an_adapter_that_trains_the_base_is_refused(model_folder: str, tmp_path: Path) -> None:
    def train_norms(trainer: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)

    trials = {name: {"base_model": model_folder, "max_steps": 2} for name in ("bad", "good")}
    base = shared_base(model_folder)
    ends = run_together(SlotHost(base, run_with_bad(tmp_path, train_norms), 2), [attach(trials)])
    assert isinstance(ends["bad"].error, CantShare) and "norm" in str(ends["bad"].error)
    assert ends["good"].error is None and not any(one.requires_grad for one in base.model.parameters())


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
